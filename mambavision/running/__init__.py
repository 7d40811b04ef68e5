"""What makes a program run as one process or many, and survive: launching, groups, signals, failures, resuming."""
