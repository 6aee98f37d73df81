//! Norm and rotation of queries and keys, and the append to the cache, for many rows.

use ctxserve_backend::DeviceError;

pub use super::attention::HeadNorms;
use super::attention::{Cache, CacheArguments, HEAD_DIM, NormsArguments, kernel_of};
use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "kv_append";
const THREADS: u32 = 256;
/// Pieces of four elements of a thread that only stores.
const STORED: usize = 4;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    qkv: u64,
    q: u64,
    cache: CacheArguments,
    position: u64,
    slot: u64,
    live: u64,
    inv_freq: u64,
    norms: NormsArguments,
    mscale: f32,
    heads: i32,
}

// SAFETY: mirrors `Params` of kernels/kv_append.cu.
unsafe impl Params for Arguments {}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct StoreArguments {
    kv: u64,
    cache: CacheArguments,
    slot: u64,
    live: u64,
}

// SAFETY: mirrors `StoreParams` of kernels/kv_append.cu.
unsafe impl Params for StoreArguments {}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct KvAppend {
    e4m3: Kernel,
    bf16: Kernel,
    store_e4m3: Kernel,
    store_bf16: Kernel,
    head_dim: usize,
}

/// Norms and rotates q and k, writes q, and k and v to the cache.
#[derive(Debug)]
pub struct Call<'a> {
    /// `[rows, (heads + 2 * kv_heads) * head_dim]`, not rotated; in q and k heads the elements `i` and `i + head_dim / 2` are adjacent.
    pub qkv: &'a Buffer<f32>,
    /// `[rows, heads * head_dim]`, bits of bf16, in natural order.
    pub q: &'a Buffer<u16>,
    /// The layer's cache.
    pub cache: Cache,
    /// Position of each row.
    pub position: &'a Buffer<i32>,
    /// `page * page_size + offset` of each row's token; negative: it is not stored.
    pub slot: &'a Buffer<i32>,
    /// One integer: rows to do.
    pub live: &'a Buffer<i32>,
    /// `head_dim / 2` frequencies.
    pub inv_freq: &'a Buffer<f32>,
    /// What q and k heads are normed with before they are rotated.
    pub norms: Option<HeadNorms<'a>>,
    /// Multiplies cosine and sine.
    pub mscale: f32,
    /// Most rows, which the grid is made for.
    pub rows: usize,
    /// Query heads; 0: rows are keys and values only, and nothing is written to `q`.
    pub heads: usize,
}

/// Writes to the cache what is rotated already.
#[derive(Debug)]
pub struct StoreCall<'a> {
    /// `[rows, 2 * kv_heads * head_dim]`: rotated keys, then values, in natural order.
    pub kv: &'a Buffer<f32>,
    /// The layer's cache.
    pub cache: Cache,
    /// As in [`Call`].
    pub slot: &'a Buffer<i32>,
    /// One integer: rows to do.
    pub live: &'a Buffer<i32>,
    /// Most rows, which the grid is made for.
    pub rows: usize,
}

impl KvAppend {
    /// Loads the kernels for heads of 64 elements.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        Self::load_for(device, HEAD_DIM)
    }

    /// Loads the kernels for heads of so many elements.
    ///
    /// # Errors
    /// Heads that there are no kernels for, or no code for this device.
    pub fn load_for(device: &Device, head_dim: usize) -> Result<Self, DeviceError> {
        let kernel = |names| device.kernel(OP, kernel_of(OP, head_dim, names)?, 0);
        Ok(Self {
            e4m3: kernel(["kv_append_e4m3", "kv_append_e4m3_128"])?,
            bf16: kernel(["kv_append_bf16", "kv_append_bf16_128"])?,
            store_e4m3: kernel(["kv_store_e4m3", "kv_store_e4m3_128"])?,
            store_bf16: kernel(["kv_store_bf16", "kv_store_bf16_128"])?,
            head_dim,
        })
    }

    /// Issues the append of rotated rows.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn store(&self, device: &Device, call: &StoreCall<'_>) -> Result<(), DeviceError> {
        let StoreCall { rows, cache, .. } = *call;
        let arguments = cache.arguments(OP)?;
        let heads = rows * 2 * cache.kv_heads;
        let fits = rows >= 1
            && call.kv.len() >= heads * self.head_dim
            && call.slot.len() >= rows
            && !call.live.is_empty();
        if !fits {
            return Err(DeviceError::new(OP, format!("{rows} rows do not fit their buffers")));
        }
        let arguments = StoreArguments {
            kv: call.kv.address(),
            cache: arguments,
            slot: call.slot.address(),
            live: call.live.address(),
        };
        let kernel = if cache.is_fp8() { &self.store_e4m3 } else { &self.store_bf16 };
        let blocks = heads.div_ceil(STORED * THREADS as usize * 4 / self.head_dim);
        let launch = Launch { grid: [blocks as u32, 1, 1], block: THREADS, shared: 0, overlap: true };
        // SAFETY: every buffer was checked to be large enough; slots are inside the cache by the caller's plan.
        unsafe { device.launch(kernel, &launch, &arguments) }
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { rows, heads, cache, .. } = *call;
        let arguments = cache.arguments(OP)?;
        let fits = rows >= 1
            && call.norms.is_none_or(|norms| norms.fit(self.head_dim))
            && call.qkv.len() >= rows * (heads + 2 * cache.kv_heads) * self.head_dim
            && call.q.len() >= rows * heads * self.head_dim
            && call.position.len() >= rows
            && call.slot.len() >= rows
            && !call.live.is_empty()
            && call.inv_freq.len() >= self.head_dim / 2;
        if !fits {
            return Err(DeviceError::new(
                OP,
                format!("{rows} rows of {heads} heads do not fit their buffers"),
            ));
        }
        let arguments = Arguments {
            qkv: call.qkv.address(),
            q: call.q.address(),
            cache: arguments,
            position: call.position.address(),
            slot: call.slot.address(),
            live: call.live.address(),
            inv_freq: call.inv_freq.address(),
            norms: HeadNorms::arguments(call.norms),
            mscale: call.mscale,
            heads: heads as i32,
        };
        let kernel = if cache.is_fp8() { &self.e4m3 } else { &self.bf16 };
        let launch = Launch { grid: [rows as u32, 1, 1], block: THREADS, shared: 0, overlap: true };
        // SAFETY: every buffer was checked to be large enough; slots are inside the cache by the caller's plan.
        unsafe { device.launch(kernel, &launch, &arguments) }
    }
}
