"""What VMs gain: increments that cost what is dirty, second VMs that add little, boots before the data is there."""
