"""What all trainings share: the run with its clock, optimiser, replicas and workers."""
