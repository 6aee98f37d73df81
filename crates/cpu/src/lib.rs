//! Backend on the CPU: plain loops that define each op, SIMD kernels that serve.
