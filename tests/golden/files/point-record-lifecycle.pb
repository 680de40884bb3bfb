
bkp-bvm-1snap-a û ñÂ±4*:
root€€€€€€" ¼˜®âÕõóÙş#»fG¦ÄÌŞâ ü&ƒÕèd$‰(0 œ8*&
data€€@€€(8Bthe bitmap is gone2 (Næ´_zøDÈ/1DóùH´{È@vK4?²y…):!éêë ì(í0î8ï@ğHñPòXó@Pb
ownerteam-7b
tasktrainr
domain.xml