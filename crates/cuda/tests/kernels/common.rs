//! What the tests share.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ctxserve_cuda::driver::{Device, unavailable};
use half::{bf16, f16};

/// One test at a time uses the device.
static TURN: Mutex<()> = Mutex::new(());

/// The device, for as long as the guard lives; `None`, with the reason printed, where there is none.
pub fn device() -> Option<(Device, MutexGuard<'static, ()>)> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(why) = unavailable(0) {
        assert!(std::env::var_os("CTXSERVE_REQUIRE_GPU").is_none(), "{why}");
        println!("skipped: {why}");
        return None;
    }
    Some((Device::open(0).unwrap(), turn))
}

/// SplitMix64; each test seeds it and prints the seed. `CTXSERVE_SEED` repeats a run.
pub struct Random(u64);

impl Random {
    pub fn new() -> Self {
        let seed =
            std::env::var("CTXSERVE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
                std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64
            });
        println!("CTXSERVE_SEED={seed}");
        Self(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Uniform in [-1, 1).
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }

    pub fn units(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| self.unit() * scale).collect()
    }
}

/// Index of element (row, col) of a matrix in panel layout (kernels/README.md).
pub fn panel(row: usize, col: usize, capacity: usize) -> usize {
    let chunk = (col / 8 % 8) ^ (row % 8);
    ((col / 64) * capacity + row) * 64 + chunk * 8 + col % 8
}

/// A row-major matrix in panel layout, `capacity` rows, padding poisoned with NaN.
pub fn to_panels(values: &[u16], cols: usize, capacity: usize) -> Vec<u16> {
    let mut panels = vec![0x7fff; capacity * cols];
    for (at, &value) in values.iter().enumerate() {
        panels[panel(at / cols, at % cols, capacity)] = value;
    }
    panels
}

pub fn to_bf16(values: &[f32]) -> Vec<u16> {
    values.iter().map(|&v| bf16::from_f32(v).to_bits()).collect()
}

pub fn to_f16(values: &[f32]) -> Vec<u16> {
    values.iter().map(|&v| f16::from_f32(v).to_bits()).collect()
}

pub fn from_bf16(bits: &[u16]) -> Vec<f64> {
    bits.iter().map(|&b| f64::from(bf16::from_bits(b))).collect()
}

pub fn from_f16(bits: &[u16]) -> Vec<f64> {
    bits.iter().map(|&b| f64::from(f16::from_bits(b))).collect()
}

/// `||got - want|| / ||want||`, infinite where a value is missing or not finite.
pub fn relative(got: &[f64], want: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let error =
        norm(&mut got.iter().zip(want).map(|(g, w)| g - w)) / norm(&mut want.iter().copied()).max(1e-300);
    if got.len() == want.len() && error.is_finite() { error } else { f64::INFINITY }
}

/// Asserts that every row of `cols` is within `limit`; says which is worst.
pub fn assert_rows(what: &str, got: &[f64], want: &[f64], cols: usize, limit: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let rows = got.chunks(cols).zip(want.chunks(cols)).map(|(g, w)| relative(g, w));
    let (row, worst) = rows.enumerate().fold((0, 0.0), |best, at| if at.1 > best.1 { at } else { best });
    assert!(worst <= limit, "{what}: row {row} is off by {worst:.3e}, limit {limit:.3e}");
    println!("{what}: worst row {worst:.2e}");
}
