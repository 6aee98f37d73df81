//! The output projection of at most 16 token rows, added to the residual stream.

use ctxserve_backend::DeviceError;

use super::gemv::{self, Gemv, Names, Product, Shape, variants};
use crate::driver::{Buffer, Device, Params};

const OP: &str = "gemv_out";

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    product: Product,
    heads: u64,
    bias: u64,
    x: u64,
}

// SAFETY: mirrors `Params` of kernels/gemv_out.cu.
unsafe impl Params for Arguments {}

/// What the kernel is loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Most token rows, 1 to 16.
    pub rows: usize,
    /// 64 times the query heads; at most 16,384.
    pub q_width: usize,
    /// Width of `x`, a multiple of 8.
    pub hidden: usize,
}

impl gemv::Dims for Dims {
    const FILE: &'static str = OP;
    const KERNELS: &'static [Names] =
        variants!("gemv_out": (3, 3, 2, split), (3, 4, 4), (3, 2, 2), (1, 2, 2));

    fn shape(&self) -> Result<Shape, DeviceError> {
        let Self { rows, q_width, hidden } = *self;
        Ok(Shape { rows, cols: q_width, outputs: hidden, normed: false, walks: false })
    }
}

/// The loaded kernel.
pub type GemvOut = Gemv<Dims>;

/// `x += heads W^T + bias`.
#[derive(Debug)]
pub struct Call<'a> {
    /// Panel layout of `[hidden, q_width]`, bits of bf16. It must have been complete before the launch before this one was
    /// issued: it is read without waiting for that.
    pub weights: &'a Buffer<u16>,
    /// `[hidden]`.
    pub bias: &'a Buffer<f32>,
    /// `[rows, q_width]`, bits of bf16.
    pub heads: &'a Buffer<u16>,
    /// `[rows, hidden]`.
    pub x: &'a Buffer<f32>,
    /// One integer: rows to do; later rows of `x` are left alone.
    pub live: &'a Buffer<i32>,
}

impl GemvOut {
    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Dims { rows, q_width, hidden } = self.dims;
        let (heads, bias, x) = (call.heads, call.bias, call.x);
        let fits = bias.len() >= hidden && heads.len() >= rows * q_width && x.len() >= rows * hidden;
        let (heads, bias, x) = (heads.address(), bias.address(), x.address());
        self.issue_with(device, fits, (call.weights, call.live), |product| Arguments {
            product,
            heads,
            bias,
            x,
        })
    }
}
