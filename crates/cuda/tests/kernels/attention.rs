//! A paged cache on the host, for the tests of the attention kernels: scrambled pages, poison wherever no token is.

use ctxserve_cuda::driver::{Buffer, Device};
use ctxserve_cuda::ops::attention::Cache;
use half::bf16;

use crate::common::Random;

/// Non-negative e4m3 codes in order: code `c` is the `c`-th number.
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let value = if exponent == 0 {
        mantissa / 8.0 * 2_f32.powi(-6)
    } else {
        (1.0 + mantissa / 8.0) * 2_f32.powi(exponent - 7)
    };
    if code & 0x80 == 0 { value } else { -value }
}

/// Nearest even, limited to 448.
pub fn to_e4m3(value: f32) -> u8 {
    let size = value.abs();
    let above = (0..0x7f_u8).find(|&code| e4m3(code) >= size).unwrap_or(0x7e);
    let below = above.saturating_sub(1);
    let (low, high) = (size - e4m3(below), e4m3(above) - size);
    let code = if low < high || (low == high && below % 2 == 0) { below } else { above };
    code | if value.is_sign_negative() { 0x80 } else { 0 }
}

/// One head of a token as the cache holds it: its bytes, its scale, what it stands for.
pub struct Stored {
    pub bytes: Vec<u8>,
    pub scale: f32,
    pub values: Vec<f64>,
}

pub fn round(values: &[f32], fp8: bool) -> Stored {
    if !fp8 {
        let rounded: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
        let bytes = rounded.iter().flat_map(|v| v.to_bits().to_le_bytes()).collect();
        return Stored { bytes, scale: 0.0, values: rounded.iter().map(|&v| f64::from(v)).collect() };
    }
    let scale = values.iter().fold(0_f32, |most, v| most.max(v.abs())) / 448.0;
    let bytes: Vec<u8> = values.iter().map(|v| if scale == 0.0 { 0 } else { to_e4m3(v / scale) }).collect();
    let values = bytes.iter().map(|&code| f64::from(e4m3(code)) * f64::from(scale)).collect();
    Stored { bytes, scale, values }
}

/// What a cache is like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub page_size: usize,
    pub kv_heads: usize,
    pub fp8: bool,
    pub window: Option<usize>,
    /// Elements of a head.
    pub dim: usize,
}

/// A layer of a pool, the tables of its sequences, and what every token stands for.
pub struct Paged {
    pub shape: Shape,
    pub pages: usize,
    pub bytes: Vec<u8>,
    pub table_at: Vec<i32>,
    pub table_first: Vec<i32>,
    pub table: Vec<i32>,
    /// By sequence, position, head: keys and values.
    pub tokens: Vec<Vec<Vec<[Vec<f64>; 2]>>>,
}

/// The same on the device.
pub struct OnDevice {
    pub pool: Buffer<u8>,
    pub table_at: Buffer<i32>,
    pub table_first: Buffer<i32>,
    pub table: Buffer<i32>,
    pub cache: Cache,
}

impl Paged {
    /// Pages for sequences, each given by the first position that is still visible and its length; no tokens yet.
    pub fn new(random: &mut Random, shape: Shape, sequences: &[(usize, usize)]) -> Self {
        let size = shape.page_size;
        let wanted: usize = sequences.iter().map(|&(first, len)| len.div_ceil(size) - first / size).sum();
        let pages = wanted + 3;
        let mut free: Vec<i32> = (0..pages as i32).collect();
        for at in (1..pages).rev() {
            free.swap(at, random.below(at + 1));
        }
        // An entry that no table points at comes first.
        let (mut table_at, mut table_first, mut table) = (Vec::new(), Vec::new(), vec![i32::MAX]);
        for &(first, len) in sequences {
            table_at.push(table.len() as i32);
            table_first.push((first / size) as i32);
            table.extend((first / size..len.div_ceil(size)).map(|_| free.pop().unwrap()));
        }
        let lines = pages * 2 * shape.kv_heads * size;
        let bytes = vec![0xff; lines * if shape.fp8 { shape.dim + 4 } else { shape.dim * 2 }];
        let tokens = sequences.iter().map(|&(_, len)| vec![Vec::new(); len]).collect();
        Self { shape, pages, bytes, table_at, table_first, table, tokens }
    }

    pub fn slot(&self, sequence: usize, position: usize) -> usize {
        let size = self.shape.page_size;
        let entry = self.table_at[sequence] as usize + position / size - self.table_first[sequence] as usize;
        self.table[entry] as usize * size + position % size
    }

    /// Which line of keys (or values) of the pool a token's head is.
    fn line(&self, slot: usize, head: usize, values: bool) -> usize {
        let Shape { page_size, kv_heads, .. } = self.shape;
        ((slot / page_size * 2 + usize::from(values)) * kv_heads + head) * page_size + slot % page_size
    }

    /// Bytes that hold a line, and those that hold its scale.
    pub fn places(
        &self,
        slot: usize,
        head: usize,
        values: bool,
    ) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
        let Shape { page_size, kv_heads, fp8, dim, .. } = self.shape;
        let line = self.line(slot, head, values);
        let width = if fp8 { dim } else { dim * 2 };
        let scale = self.pages * 2 * kv_heads * page_size * dim + line * 4;
        (line * width..(line + 1) * width, if fp8 { scale..scale + 4 } else { 0..0 })
    }

    /// Rounds a token's keys and values, `[kv_heads * dim]` each, remembers what they stand for and, if `stored`, puts them
    /// into the pool.
    pub fn put(&mut self, sequence: usize, position: usize, keys: &[f32], values: &[f32], stored: bool) {
        let slot = self.slot(sequence, position);
        self.tokens[sequence][position].clear();
        let dim = self.shape.dim;
        for head in 0..self.shape.kv_heads {
            let kinds = [keys, values].map(|kind| round(&kind[head * dim..][..dim], self.shape.fp8));
            for (kind, of_values) in kinds.iter().zip([false, true]) {
                let (data, scale) = self.places(slot, head, of_values);
                if stored {
                    self.bytes[data].copy_from_slice(&kind.bytes);
                }
                if stored && self.shape.fp8 {
                    self.bytes[scale].copy_from_slice(&kind.scale.to_le_bytes());
                }
            }
            self.tokens[sequence][position].push(kinds.map(|kind| kind.values));
        }
    }

    /// Random tokens at `positions`.
    pub fn fill(&mut self, random: &mut Random, sequence: usize, positions: std::ops::Range<usize>) {
        let width = self.shape.kv_heads * self.shape.dim;
        for position in positions {
            let loud = 2_f32.powf(random.unit() * 3.0);
            let (keys, values) = (random.units(width, loud), random.units(width, 1.0 / loud));
            self.put(sequence, position, &keys, &values, true);
        }
    }

    pub fn first_visible(&self, position: usize) -> usize {
        self.shape.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Attention of one query head in float64.
    pub fn attend(
        &self,
        sequence: usize,
        position: usize,
        head: usize,
        q: &[f64],
        scale: f64,
        sink: Option<f64>,
    ) -> Vec<f64> {
        let seen = &self.tokens[sequence][self.first_visible(position)..=position];
        let scores: Vec<f64> = seen
            .iter()
            .map(|token| token[head][0].iter().zip(q).map(|(k, q)| k * q).sum::<f64>() * scale)
            .collect();
        let peak = scores.iter().copied().fold(sink.unwrap_or(f64::NEG_INFINITY), f64::max);
        let mut total = sink.map_or(0.0, |sink| (sink - peak).exp());
        let mut out = vec![0.0; self.shape.dim];
        for (token, score) in seen.iter().zip(&scores) {
            let p = (score - peak).exp();
            total += p;
            out.iter_mut().zip(&token[head][1]).for_each(|(out, v)| *out += p * v);
        }
        out.iter_mut().for_each(|out| *out /= total);
        out
    }

    pub fn upload(&self, device: &Device) -> OnDevice {
        // Two layers; the first is poison, to see that the second is used.
        let mut both = vec![0xff; self.bytes.len()];
        both.extend_from_slice(&self.bytes);
        let pool = device.upload(&both).unwrap();
        let Shape { page_size, kv_heads, fp8, window, dim } = self.shape;
        let data = pool.address() + self.bytes.len() as u64;
        let scales = if fp8 { data + (self.pages * 2 * kv_heads * page_size * dim) as u64 } else { 0 };
        OnDevice {
            pool,
            table_at: device.upload(&self.table_at).unwrap(),
            table_first: device.upload(&self.table_first).unwrap(),
            table: device.upload(&self.table).unwrap(),
            cache: Cache { data, scales, page_size, kv_heads, window },
        }
    }
}

impl OnDevice {
    /// The bytes of the layer; the one before it must still be poison.
    pub fn read(&self) -> Vec<u8> {
        let len = self.pool.len() / 2;
        let both = self.pool.read(0, 2 * len).unwrap();
        assert!(both[..len].iter().all(|&byte| byte == 0xff), "another layer was written");
        both[len..].to_vec()
    }

    pub fn tables(&self) -> ctxserve_cuda::ops::attention::Tables<'_> {
        ctxserve_cuda::ops::attention::Tables {
            at: &self.table_at,
            first: &self.table_first,
            pages: &self.table,
        }
    }
}

/// Sinks around typical scores, far above and far below them.
pub fn sinks(random: &mut Random, heads: usize) -> Vec<f32> {
    (0..heads).map(|head| random.unit() * 4.0 + [0.0, 20.0, -30.0][head % 3]).collect()
}

#[test]
fn e4m3_rounds_to_nearest_even() {
    for (value, want) in [
        (0.0, 0.0),
        (448.0, 448.0),
        (1e9, 448.0),
        (17.0, 16.0),
        (19.0, 20.0),
        (17.5, 18.0),
        (2_f32.powi(-10), 0.0),
        (0.0016, 2_f32.powi(-9)),
    ] {
        assert_eq!(e4m3(to_e4m3(value)), want, "{value}");
        assert_eq!(e4m3(to_e4m3(-value)), -want, "-{value}");
    }
    for code in (0..=255_u8).filter(|code| code & 0x7f != 0x7f) {
        assert_eq!(to_e4m3(e4m3(code)), code);
    }
}
