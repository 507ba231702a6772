"""What emitted kernels import or inline."""
