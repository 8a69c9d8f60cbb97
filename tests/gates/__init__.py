"""What can be said of GPU kernels without a GPU: every card has them, in the instructions that were meant."""
