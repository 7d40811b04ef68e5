"""Running programs in one process or many: launching, process groups, signals, failures and resuming."""
