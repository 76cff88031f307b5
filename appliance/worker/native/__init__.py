"""Own CPU kernels in C, built where a compiler is present (docs/adr/0009-native-cpu-kernels.md)."""
