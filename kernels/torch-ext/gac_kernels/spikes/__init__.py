"""What is made of spikes: bits, counts and rates."""
