"""The same as one kernel for Hopper GPUs, in Gluon."""
