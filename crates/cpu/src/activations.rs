//! Activations as NVFP4, for checkpoints that were calibrated for it: values `e2m1 * e4m3 * factor`, one E4M3 scale per 16.
//!
//! The factor is the checkpoint's, so that a value beyond six times the largest scale saturates. Scales and codes are
//! found in f64 by division and rounded to the nearest, ties to even: the definition, where GPUs approximate reciprocals.

use ctxserve_core::NVFP4_BLOCK;

/// The largest E4M3 value.
const LARGEST_SCALE: f64 = 448.0;
/// The largest E2M1 value.
const LARGEST: f64 = 6.0;

/// Rounds rows to what NVFP4 with this factor holds. A block with a NaN or an infinity becomes NaN, so that garbage stays visible.
pub(crate) fn round_to_nvfp4(x: &mut [f32], factor: f32) {
    let factor = f64::from(factor);
    for block in x.chunks_mut(NVFP4_BLOCK) {
        let peak = block.iter().fold(0.0_f64, |peak, x| peak.max(f64::from(x.abs())));
        if block.iter().any(|x| !x.is_finite()) {
            block.fill(f32::NAN);
            continue;
        }
        let scale = to_e4m3((peak / (LARGEST * factor)).min(LARGEST_SCALE));
        for x in block {
            let code = if scale == 0.0 { 0.0 } else { to_e2m1(f64::from(*x) / (scale * factor)) };
            *x = (code * scale * factor) as f32;
        }
    }
}

/// The nearest E4M3 value of one in `0.0..=448.0`: three bits of mantissa, smallest normal exponent -6.
fn to_e4m3(x: f64) -> f64 {
    let exponent = ((x.to_bits() >> 52) as i32 - 1023).max(-6);
    let step = f64::from(exponent - 3).exp2();
    (x / step).round_ties_even() * step
}

/// The nearest E2M1 value; beyond the largest, that.
fn to_e2m1(x: f64) -> f64 {
    let size = x.abs();
    let step = match size {
        _ if size < 2.0 => 0.5,
        _ if size < 4.0 => 1.0,
        _ => 2.0,
    };
    ((x / step).round_ties_even() * step).clamp(-LARGEST, LARGEST)
}

#[cfg(test)]
mod tests {
    use ctxserve_backend::conformance::Random;
    use ctxserve_backend::{Backend, Role};
    use ctxserve_core::{E2M1, Elements, Matrix, Nvfp4Run, e4m3};

    use super::*;
    use crate::backend::{ActivationQuant, CpuBackend, CpuOptions, Precision};
    use crate::linear::linear;
    use crate::rows::Rows;

    #[test]
    fn ties_go_to_even_codes() {
        let cases = [
            (0.25, 0.0),
            (0.26, 0.5),
            (0.75, 1.0),
            (1.25, 1.0),
            (1.75, 2.0),
            (2.5, 2.0),
            (3.5, 4.0),
            (5.0, 4.0),
            (5.1, 6.0),
            (9.0, 6.0),
        ];
        for (x, code) in cases {
            assert_eq!((to_e2m1(x), to_e2m1(-x)), (code, -code), "{x}");
        }
    }

    /// The nearest of all E4M3 values, the even one of two that are as near.
    fn nearest_scale(x: f64) -> f64 {
        let distance = |byte: u8| (f64::from(e4m3(byte)) - x).abs();
        let better = |a: u8, b: u8| {
            let even = distance(b) == distance(a) && b.is_multiple_of(2);
            if distance(b) < distance(a) || even { b } else { a }
        };
        f64::from(e4m3((0..=0x7e).reduce(better).unwrap()))
    }

    /// Likewise of all codes.
    fn nearest_code(x: f64) -> f64 {
        let distance = |code: usize| (f64::from(E2M1[code]) - x.abs()).abs();
        let better = |a: usize, b: usize| {
            let even = distance(b) == distance(a) && b.is_multiple_of(2);
            if distance(b) < distance(a) || even { b } else { a }
        };
        f64::from(E2M1[(0..8).reduce(better).unwrap()]).copysign(x)
    }

    #[test]
    fn scales_are_the_nearest() {
        let mut random = Random::new(5);
        let middles = (0..0x7e).map(|byte| f64::from(e4m3(byte)).midpoint(f64::from(e4m3(byte + 1))));
        let others = (0..2000).map(|_| f64::from(random.signed().abs()).powi(4) * 448.0);
        for x in middles.chain(others) {
            assert_eq!(to_e4m3(x), nearest_scale(x), "{x}");
        }
        assert_eq!((to_e4m3(0.0), to_e4m3(448.0), to_e4m3(1e-300)), (0.0, 448.0, 0.0));
    }

    #[test]
    fn garbage_stays_visible_and_zero_is_zero() {
        for garbage in [f32::NAN, f32::INFINITY] {
            let mut x = [1.0; 32];
            x[3] = garbage;
            round_to_nvfp4(&mut x, 0.01);
            assert!(x[..16].iter().all(|x| x.is_nan()) && x[16..].iter().all(|x| x.is_finite()));
        }
        let mut x = [0.0; 16];
        round_to_nvfp4(&mut x, 0.01);
        assert_eq!(x, [0.0; 16]);
    }

    const COLS: usize = 48;
    const RUNS: [(usize, f32, f32); 3] = [(7, 0.02, 3e-4), (5, 0.03, 2e-3), (8, 0.01, 3e-4)];

    fn matrix(random: &mut Random, input: impl Fn(f32) -> Option<f32>) -> Matrix {
        let codes = (0..20 * COLS / 2).map(|_| random.bits() as u8).collect();
        let scales = (0..20 * COLS / 16).map(|_| 1 + random.below(0x7e) as u8).collect();
        let runs = RUNS.map(|(rows, weight, factor)| Nvfp4Run { rows, weight, input: input(factor) });
        Matrix::new(20, COLS, Elements::Nvfp4 { codes, scales, runs: runs.into() }).unwrap()
    }

    /// `s w sum over blocks of SF_x SF_w (sum of q_x q_w)`, from the stored bytes.
    fn reference(matrix: &Matrix, x: &[f32]) -> Vec<f64> {
        let Elements::Nvfp4 { codes, scales, .. } = matrix.elements() else { unreachable!() };
        let factors = RUNS.iter().flat_map(|&(rows, weight, input)| vec![(weight, input); rows]);
        let product = |(row, (weight, input)): (usize, (f32, f32))| {
            let (weight, input) = (f64::from(weight), f64::from(input));
            let block = |(at, x): (usize, &[f32])| {
                let peak = x.iter().fold(0.0, |peak: f32, x| peak.max(x.abs()));
                let scale = nearest_scale((f64::from(peak) / (6.0 * input)).min(448.0));
                let q = |x: f32| {
                    let code = nearest_code((f64::from(x) / (scale * input)).clamp(-6.0, 6.0));
                    if scale == 0.0 { 0.0 } else { code }
                };
                let code = |k: usize| {
                    let byte = codes[(row * COLS + at * 16 + k) / 2];
                    f64::from(E2M1[usize::from(if k.is_multiple_of(2) { byte & 15 } else { byte >> 4 })])
                };
                let dot: f64 = x.iter().enumerate().map(|(k, &x)| q(x) * code(k)).sum();
                scale * f64::from(e4m3(scales[row * (COLS / 16) + at])) * dot
            };
            weight * input * x.chunks(16).enumerate().map(block).sum::<f64>()
        };
        factors.enumerate().map(product).collect()
    }

    #[test]
    fn products_are_those_of_the_definition() {
        let mut random = Random::new(6);
        let matrix = matrix(&mut random, Some);
        for rows in [1, 2, 9] {
            let mut x = random.vector(rows * COLS, 1.0);
            // One block beyond the calibrated range, one of zeros, one of small values.
            x[..16].iter_mut().for_each(|x| *x *= 30.0);
            x[16..32].fill(0.0);
            x[32..48].iter_mut().for_each(|x| *x *= 1e-3);
            let options = CpuOptions { activations: ActivationQuant::Nvfp4, ..CpuOptions::default() };
            let mut backend = CpuBackend::new(options).unwrap();
            let loaded = backend.load_matrix(matrix.clone(), None, Role::Down).unwrap();
            let got =
                linear("test", backend.fast.as_ref(), &loaded, &Rows::from_vec(x.clone(), COLS)).unwrap();
            for (row, x) in x.chunks(COLS).enumerate() {
                let want = reference(&matrix, x);
                let size = want.iter().map(|x| x * x).sum::<f64>().sqrt();
                let pairs = got.row(row).iter().zip(&want);
                let error = pairs.map(|(got, want)| (f64::from(*got) - want).powi(2)).sum::<f64>().sqrt();
                assert!(error < 1e-6 * size, "row {row} of {rows}: {error:e} of {size:e}");
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let int8 = CpuOptions {
            activations: ActivationQuant::Nvfp4,
            precision: Precision::Int8,
            ..CpuOptions::default()
        };
        assert!(CpuBackend::new(int8).is_err());
        let options = CpuOptions { activations: ActivationQuant::Nvfp4, ..CpuOptions::default() };
        let mut backend = CpuBackend::new(options).unwrap();
        let uncalibrated = matrix(&mut Random::new(7), |_| None);
        let error = backend.load_matrix(uncalibrated.clone(), None, Role::Down).unwrap_err();
        assert!(error.to_string().contains("calibrated"), "{error}");
        let mut exact = CpuBackend::new(CpuOptions::default()).unwrap();
        exact.load_matrix(uncalibrated, None, Role::Down).unwrap();
    }
}
