//! RMSNorm and the LM head for at most 16 rows of logits.

use ctxserve_backend::DeviceError;

use super::gemv::{self, Gemv, Names, Product, Shape, variants};
use crate::driver::{Buffer, Device, Params};

const OP: &str = "gemv_head";

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    product: Product,
    x: u64,
    norm: u64,
    index: u64,
    logits: u64,
    sources: u32,
    vocab: i32,
    stride: i32,
    mean: f32,
    eps: f32,
}

// SAFETY: mirrors `Params` of kernels/gemv_head.cu.
unsafe impl Params for Arguments {}

/// What the kernel is loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Most rows of logits, 1 to 16.
    pub rows: usize,
    /// Width of `x`, padded to a multiple of 64; at most 16,384.
    pub cols: usize,
    /// Tokens. The matrix has this many rows, rounded up to a multiple of 8.
    pub vocab: usize,
    /// Elements from one row of logits to the next, even.
    pub stride: usize,
}

impl gemv::Dims for Dims {
    const FILE: &'static str = OP;
    const KERNELS: &'static [Names] = variants!("gemv_head": (5, 3, 3), (5, 2, 2), (2, 2, 2), (1, 2, 2));

    fn shape(&self) -> Result<Shape, DeviceError> {
        let Self { rows, cols, vocab, stride } = *self;
        if vocab > stride || !stride.is_multiple_of(2) || i32::try_from(stride).is_err() {
            return Err(DeviceError::new(OP, format!("rows of {vocab} logits, {stride} apart")));
        }
        Ok(Shape { rows, cols, outputs: vocab.next_multiple_of(8), normed: true, walks: true })
    }
}

/// The loaded kernel.
pub type GemvHead = Gemv<Dims>;

/// `logits = norm(x[index]) W^T`.
#[derive(Debug)]
pub struct Call<'a> {
    /// Panel layout of `[vocab rounded up to 8, cols]`, bits of bf16. It must have been complete before the launch before
    /// this one was issued: it is read without waiting for that.
    pub weights: &'a Buffer<u16>,
    /// `[cols]`, zero beyond `norm_cols`.
    pub norm: &'a Buffer<f32>,
    /// `[rows, cols]` and more, zero beyond `norm_cols`.
    pub x: &'a Buffer<f32>,
    /// Row of `x` for each row of logits; the same row where absent. Rows that `x` has not are read as its last.
    pub index: Option<&'a Buffer<i32>>,
    /// One integer: rows to do; later rows of `logits` are left alone.
    pub live: &'a Buffer<i32>,
    /// `[rows, stride]`, the first `vocab` of each row are written.
    pub logits: &'a Buffer<f32>,
    /// Elements that the mean square is over.
    pub norm_cols: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl GemvHead {
    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Dims { rows, cols, vocab, stride } = self.dims;
        let fits = call.norm.len() >= cols
            && call.index.map_or(call.x.len() >= rows * cols, |index| index.len() >= rows)
            && call.x.len() >= cols
            && call.logits.len() >= rows * stride
            && (1..=cols).contains(&call.norm_cols);
        self.issue_with(device, fits, (call.weights, call.live), |product| Arguments {
            product,
            x: call.x.address(),
            norm: call.norm.address(),
            index: call.index.map_or(0, Buffer::address),
            logits: call.logits.address(),
            sources: u32::try_from(call.x.len() / cols).unwrap_or(u32::MAX),
            vocab: vocab as i32,
            stride: stride as i32,
            mean: 1.0 / call.norm_cols as f32,
            eps: call.eps,
        })
    }
}
