"""`make gpu`: what CPUs cannot prove, checked and measured on a machine with a GPU, or rehearsed without one."""
