
vm-1 
root/images/root.raw€€ (ÿŸñÂ±4"
ownerteam-7"
tasktrain2
domain.xml:snap-zB6
weightstask-1root ***/*.safetensors2/tmp/**8H¨æñÂ±4