
bkp-bvm-1"snap-a*snap-z2@¼˜®âÕõóÙş#»fG¦ÄÌŞâ ü&ƒÕèd$‰ğO®¦!r*äÍ?XóıâD—3¸â,'pŞ:F×¸a¤o8@H ñÂ±4P*Zagent-7b
ownerteam-7b
tasktrainj
domain.xml