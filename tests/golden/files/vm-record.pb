
vm-1 
root/images/root.raw€€ (ÿŸñÂ±4