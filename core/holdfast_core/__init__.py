"""What every part of Holdfast shares: the pure model (`model`) and the shell around it (`runtime`)."""
