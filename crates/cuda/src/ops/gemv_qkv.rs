//! RMSNorm, the fused QKV product, bias and rotary embedding of at most 16 token rows.

use ctxserve_backend::DeviceError;

use super::gemv::{self, Gemv, Names, Product, Shape, variants};
use crate::driver::{Buffer, Device, Params};

const OP: &str = "gemv_qkv";
/// Dimensions of a head in the matrix.
const HEAD: usize = 64;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    product: Product,
    x: u64,
    norm: u64,
    bias: u64,
    positions: u64,
    inv_freq: u64,
    q: u64,
    kv: u64,
    q_width: i32,
    kv_width: i32,
    rope_pairs: i32,
    mean: f32,
    eps: f32,
    mscale: f32,
}

// SAFETY: mirrors `Params` of kernels/gemv_qkv.cu.
unsafe impl Params for Arguments {}

/// What the kernel is loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Most token rows, 1 to 16.
    pub rows: usize,
    /// Width of `x`, padded to a multiple of 64; at most 16,384.
    pub cols: usize,
    /// 64 times the query heads.
    pub q_width: usize,
    /// 64 times the key heads.
    pub kv_width: usize,
}

impl gemv::Dims for Dims {
    const FILE: &'static str = OP;
    const KERNELS: &'static [Names] =
        variants!("gemv_qkv": (5, 2, 2, split), (5, 2, 1), (2, 2, 1), (1, 2, 1));

    fn shape(&self) -> Result<Shape, DeviceError> {
        let Self { rows, cols, q_width, kv_width } = *self;
        if !q_width.is_multiple_of(HEAD) || !kv_width.is_multiple_of(HEAD) {
            return Err(DeviceError::new(
                OP,
                format!("{q_width} and {kv_width} are not whole heads of {HEAD}"),
            ));
        }
        Ok(Shape { rows, cols, outputs: q_width + 2 * kv_width, normed: true, walks: false })
    }
}

/// The loaded kernel.
pub type GemvQkv = Gemv<Dims>;

/// `q, k, v = rope(norm(x) W^T + bias)`.
#[derive(Debug)]
pub struct Call<'a> {
    /// Panel layout of `[q_width + 2 * kv_width, cols]`, bits of bf16, rows permuted as kernels/README.md says. It must have
    /// been complete before the launch before this one was issued: it is read without waiting for that.
    pub weights: &'a Buffer<u16>,
    /// `[q_width + 2 * kv_width]`, permuted alike.
    pub bias: &'a Buffer<f32>,
    /// `[cols]`, zero beyond `norm_cols`.
    pub norm: &'a Buffer<f32>,
    /// `[rows, cols]`, zero beyond `norm_cols`.
    pub x: &'a Buffer<f32>,
    /// One integer: rows to do; later rows of the outputs are left alone.
    pub live: &'a Buffer<i32>,
    /// `[rows]`.
    pub positions: &'a Buffer<i32>,
    /// One frequency a pair; at most 32.
    pub inv_freq: &'a Buffer<f32>,
    /// `[rows, q_width]`, bits of bf16, heads in natural order.
    pub q: &'a Buffer<u16>,
    /// `[rows, 2 * kv_width]`: keys, rotated, in natural order, then values.
    pub kv: &'a Buffer<f32>,
    /// Elements that the mean square is over.
    pub norm_cols: usize,
    /// Added to the mean square.
    pub eps: f32,
    /// Factor of cosine and sine.
    pub mscale: f32,
}

impl GemvQkv {
    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Dims { rows, cols, q_width, kv_width } = self.dims;
        let fits = call.bias.len() >= q_width + 2 * kv_width
            && call.norm.len() >= cols
            && call.x.len() >= rows * cols
            && call.positions.len() >= rows
            && call.inv_freq.len() <= HEAD / 2
            && call.q.len() >= rows * q_width
            && call.kv.len() >= rows * 2 * kv_width
            && (1..=cols).contains(&call.norm_cols);
        self.issue_with(device, fits, (call.weights, call.live), |product| Arguments {
            product,
            x: call.x.address(),
            norm: call.norm.address(),
            bias: call.bias.address(),
            positions: call.positions.address(),
            inv_freq: call.inv_freq.address(),
            q: call.q.address(),
            kv: call.kv.address(),
            q_width: q_width as i32,
            kv_width: kv_width as i32,
            rope_pairs: call.inv_freq.len() as i32,
            mean: 1.0 / call.norm_cols as f32,
            eps: call.eps,
            mscale: call.mscale,
        })
    }
}
