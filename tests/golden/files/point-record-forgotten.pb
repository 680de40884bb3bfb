
snap-avm-1 € ñÂ±4@HP