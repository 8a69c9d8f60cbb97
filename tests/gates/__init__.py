"""What can be said of GPU kernels without a GPU: they compile for every card, their instructions are the expected ones, nothing spills."""
