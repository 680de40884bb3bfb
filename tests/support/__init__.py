"""What tests of several folders share: real servers and other things that stand in for the outside world."""
