"""Vector operations for Numba, written as LLVM IR by hand where its own loops are slow."""
