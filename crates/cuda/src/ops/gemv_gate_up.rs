//! RMSNorm, gate and up projection and SwiGLU of at most 16 token rows.

use ctxserve_backend::DeviceError;

use super::gemv::{self, Gemv, Names, Product, Shape, variants};
use crate::driver::{Buffer, Device, Params};

const OP: &str = "gemv_gate_up";

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    product: Product,
    x: u64,
    norm: u64,
    y: u64,
    inner: i32,
    mean: f32,
    eps: f32,
}

// SAFETY: mirrors `Params` of kernels/gemv_gate_up.cu.
unsafe impl Params for Arguments {}

/// What the kernel is loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Most token rows, 1 to 16.
    pub rows: usize,
    /// Width of `x`, padded to a multiple of 64; at most 16,384.
    pub cols: usize,
    /// Gates, as many as ups; a multiple of 8.
    pub inner: usize,
}

impl gemv::Dims for Dims {
    const FILE: &'static str = OP;
    // Tiles in pairs: `gemv::plans` keeps them together.
    const KERNELS: &'static [Names] = variants!("gemv_gate_up": (4, 3, 3), (4, 2, 2), (2, 2, 2));

    fn shape(&self) -> Result<Shape, DeviceError> {
        let Self { rows, cols, inner } = *self;
        if !inner.is_multiple_of(8) {
            return Err(DeviceError::new(OP, format!("{inner} gates are no multiple of 8")));
        }
        Ok(Shape { rows, cols, outputs: 2 * inner, normed: true, walks: true })
    }
}

/// The loaded kernel.
pub type GemvGateUp = Gemv<Dims>;

/// `y = silu(gate) * up`, with gate and up of `norm(x) W^T`.
#[derive(Debug)]
pub struct Call<'a> {
    /// Panel layout of `[2 * inner, cols]`, bits of bf16: of every 16 rows the first eight are gates, the others the ups. It must
    /// have been complete before the launch before this one was issued: it is read without waiting for that.
    pub weights: &'a Buffer<u16>,
    /// `[cols]`, zero beyond `norm_cols`.
    pub norm: &'a Buffer<f32>,
    /// `[rows, cols]`, zero beyond `norm_cols`.
    pub x: &'a Buffer<f32>,
    /// One integer: rows to do; later rows of `y` are left alone.
    pub live: &'a Buffer<i32>,
    /// `[rows, inner]`, bits of bf16.
    pub y: &'a Buffer<u16>,
    /// Elements that the mean square is over.
    pub norm_cols: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl GemvGateUp {
    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Dims { rows, cols, inner } = self.dims;
        let fits = call.norm.len() >= cols
            && call.x.len() >= rows * cols
            && call.y.len() >= rows * inner
            && (1..=cols).contains(&call.norm_cols);
        self.issue_with(device, fits, (call.weights, call.live), |product| Arguments {
            product,
            x: call.x.address(),
            norm: call.norm.address(),
            y: call.y.address(),
            inner: inner as i32,
            mean: 1.0 / call.norm_cols as f32,
            eps: call.eps,
        })
    }
}
