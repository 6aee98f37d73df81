use ctxserve_cuda::driver::Device;
use ctxserve_cuda::ops::quantise_nvfp4::{Call, NormedCall, QuantiseNvfp4, Rounding};
use half::bf16;

use crate::common::{Random, device, from_bf16, panel, to_bf16, to_panels};

const CODES: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// E4M3 values without a sign, NaN left out.
fn scales() -> Vec<f64> {
    let value = |byte: i32| match byte / 8 {
        0 => f64::from(byte) * 2_f64.powi(-9),
        exponent => f64::from(8 + byte % 8) * 2_f64.powi(exponent - 10),
    };
    (0..0x7f).map(value).collect()
}

/// The nearest of ascending values to `v / unit`, of two that are as near the one with the even index. `unit` times a middle of two values is
/// exact in float64, and no quotient is made.
fn nearest(values: &[f64], v: f64, unit: f64) -> f64 {
    let at = values.windows(2).take_while(|pair| v > pair[0].midpoint(pair[1]) * unit).count();
    let tie = values.get(at + 1).is_some_and(|next| v == values[at].midpoint(*next) * unit);
    if tie && at % 2 == 1 { values[at + 1] } else { values[at] }
}

/// `code * scale` of a block of 16, by definition.
fn rounded(block: &[f64], factor: f32) -> Vec<f64> {
    let factor = f64::from(factor);
    if block.iter().any(|v| !v.is_finite()) {
        return vec![f64::NAN; block.len()];
    }
    let peak = block.iter().fold(0.0_f64, |peak, v| peak.max(v.abs()));
    let scale = nearest(&scales(), peak, 6.0 * factor);
    let code = |v: &f64| if scale == 0.0 { 0.0 } else { nearest(&CODES, v.abs(), scale * factor) };
    block.iter().map(|v| (code(v) * scale).copysign(*v)).collect()
}

/// What the kernel does, step by step: the quotient may be off by a few units of the last place, here by `off` of itself.
fn emulated(block: &[f32], factor: f32, off: f32) -> Vec<f64> {
    fn nearest(mantissa: u32, least: i32, quotient: f32, v: f32, times: f32, factor: f32) -> f32 {
        let exponent = (quotient.to_bits() & 0x7f80_0000).max(((127 + least) as u32) << 23);
        let step = f32::from_bits(exponent - (mantissa << 23));
        let steps = (quotient / step).floor();
        let (below, half) = (steps * step, f32::from_bits(exponent - ((mantissa + 1) << 23)));
        let over = (-((below + half) * times)).mul_add(factor, v);
        let up = over > 0.0 || over == 0.0 && steps % 2.0 == 1.0;
        if up { below + 2.0 * half } else { below }
    }
    let peak = block.iter().fold(0.0_f32, |peak, v| peak.max(v.abs()));
    let quotient = (peak / (6.0 * factor) * (1.0 + off)).min(448.0);
    let scale = nearest(3, -6, quotient, peak, 6.0, factor).min(448.0);
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / (scale * factor) };
    let code =
        |v: f32| nearest(1, 0, (v.abs() * inverse * (1.0 + off)).min(6.0), v.abs(), scale, factor).min(6.0);
    block.iter().map(|&v| f64::from((code(v) * scale).copysign(v))).collect()
}

/// A block of 16 that is hard: magnitudes within a unit of the last place of the middles between codes and between scales, those themselves
/// where `factor` lets bf16 or float32 hold them, zeros, values beyond the calibrated range and far below it.
fn block(random: &mut Random, factor: f32, narrow: bool) -> Vec<f32> {
    let scales = scales();
    let near = |random: &mut Random, v: f64| {
        let v = if narrow { bf16::from_f64(v).to_f32() } else { v as f32 };
        let step = if narrow { 1 << 16 } else { 1 };
        let bits = v.to_bits().saturating_add_signed(step * (random.below(3) as i32 - 1));
        f32::from_bits(bits & if narrow { 0xffff_0000 } else { u32::MAX })
    };
    let scale = scales[[random.below(0x7f), 8 + random.below(0x70)][random.below(2)]];
    let unit = scale * f64::from(factor);
    let mut block: Vec<f32> = (0..16)
        .map(|_| {
            let size = match random.below(6) {
                0 => 0.0,
                1 | 2 => {
                    let at = random.below(7);
                    near(random, CODES[at].midpoint(CODES[at + 1]) * unit)
                }
                3 => {
                    let at = random.below(8);
                    near(random, CODES[at] * unit)
                }
                _ => {
                    let part = f64::from(random.unit().abs());
                    near(random, part * 6.0 * unit)
                }
            };
            if random.below(2) == 0 { size } else { -size }
        })
        .collect();
    // The peak says what the scale is.
    let next = scales.iter().find(|&&next| next > scale).copied().unwrap_or(480.0);
    let peak = match random.below(5) {
        0 => near(random, 6.0 * unit),
        1 | 2 => near(random, 6.0 * f64::from(factor) * scale.midpoint(next)),
        3 => {
            let power = f64::from(random.unit()) * 5.0;
            near(random, 6.0 * f64::from(factor) * 10_f64.powf(power))
        }
        _ => block[0],
    };
    block[random.below(16)] = peak;
    block
}

fn factor(random: &mut Random) -> f32 {
    match random.below(4) {
        // Ties are exact where the factor has few bits.
        0 => 2_f32.powi(random.below(30) as i32 - 20),
        1 => (1.0 + random.below(16) as f32 / 16.0) * 2_f32.powi(random.below(20) as i32 - 15),
        2 => 10_f32.powf(random.unit() * 27.0),
        _ => 10_f32.powf(random.unit() * 2.0 - 2.5),
    }
}

/// What the kernel computes is the definition whichever way its quotients are rounded: no device is needed for this.
#[test]
fn quantise_nvfp4_steps_give_the_definition() {
    let mut random = Random::new();
    let mut ties = 0;
    for _ in 0..20_000 {
        let (factor, narrow) = (factor(&mut random), random.below(2) == 0);
        let block = block(&mut random, factor, narrow);
        let wide: Vec<f64> = block.iter().map(|&v| f64::from(v)).collect();
        let want = rounded(&wide, factor);
        for off in [0.0, 1e-6, -1e-6] {
            assert_eq!(emulated(&block, factor, off), want, "{block:?} by {factor:e}, off by {off:e}");
        }
        // What is written is exact in bf16.
        assert!(want.iter().all(|&v| f64::from(bf16::from_f64(v)) == v), "{want:?}");
        let peak = wide.iter().fold(0.0_f64, |peak, v| peak.max(v.abs()));
        let scale = nearest(&scales(), peak, 6.0 * f64::from(factor)) * f64::from(factor);
        ties +=
            wide.iter().filter(|v| CODES.windows(2).any(|c| v.abs() == c[0].midpoint(c[1]) * scale)).count();
    }
    assert!(ties > 1000, "only {ties} ties");
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    live: usize,
    rows: usize,
    cols: usize,
    /// Of panels.
    capacity: Option<usize>,
    scaled: bool,
}

impl Shape {
    fn all(random: &mut Random) -> Vec<Self> {
        let mut shapes = Vec::new();
        for (live, rows, cols) in [
            (1, 1, 64),
            (1, 2, 2560),
            (8, 8, 9728),
            (3, 5, 4096),
            (17, 20, 128),
            (130, 131, 2880),
            (77, 80, 9216),
        ] {
            for capacity in [None, Some((rows + 9_usize).next_multiple_of(8))] {
                shapes.push(Self { live, rows, cols, capacity, scaled: random.below(4) == 0 });
            }
        }
        shapes
    }

    /// Where an element is, of rows of `cols`.
    fn place(self, row: usize, col: usize, cols: usize) -> usize {
        self.capacity.map_or(row * cols + col, |capacity| panel(row, col, capacity))
    }

    fn of_panels(self, values: &[u16], cols: usize) -> Vec<u16> {
        self.capacity.map_or_else(|| values.to_vec(), |capacity| to_panels(values, cols, capacity))
    }
}

/// Asserts that bits are those of the definition, NaN for NaN.
fn assert_bits(what: &str, got: &[u16], want: &[f64], factor: f32, scaled: bool) {
    for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
        // The kernel multiplies in float32.
        let want = if scaled { (want * f64::from(factor)) as f32 } else { want as f32 };
        let (got, want) = (bf16::from_bits(got), bf16::from_f32(want));
        // Where scale and factor are multiplied first the product may be rounded another way.
        let same = got == want || got.is_nan() && want.is_nan();
        let near = scaled && got.to_bits().abs_diff(want.to_bits()) <= 1;
        assert!(same || near, "{what}: element {at} is {got}, and should be {want}");
    }
}

#[test]
fn quantise_nvfp4_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let kernel = QuantiseNvfp4::load(&device).unwrap();
    let mut random = Random::new();
    for s in Shape::all(&mut random) {
        let factor = factor(&mut random).clamp(1e-20, 1e20);
        let blocks = s.rows * s.cols / 16;
        let mut x: Vec<u16> = (0..blocks).flat_map(|_| to_bf16(&block(&mut random, factor, true))).collect();
        for garbage in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let at = random.below(x.len());
            x[at] = bf16::from_f32(garbage).to_bits();
        }
        let on_device = device.upload(&s.of_panels(&x, s.cols)).unwrap();
        let before = on_device.read(0, on_device.len()).unwrap();
        let live = device.upload(&[s.live as i32]).unwrap();
        let rounding = Rounding { factors: &[factor], scaled: s.scaled };
        let Shape { rows, cols, capacity, .. } = s;
        kernel.issue(&device, &Call { x: &on_device, live: &live, rows, cols, capacity, rounding }).unwrap();
        let mut after = on_device.read(0, on_device.len()).unwrap();
        let wide = from_bf16(&x);
        for row in 0..s.live {
            let places: Vec<usize> = (0..cols).map(|col| s.place(row, col, cols)).collect();
            let got: Vec<u16> =
                places.iter().map(|&at| std::mem::replace(&mut after[at], before[at])).collect();
            let want: Vec<f64> =
                wide[row * cols..][..cols].chunks(16).flat_map(|block| rounded(block, factor)).collect();
            assert_bits(&format!("{s:?}, row {row}, factor {factor:e}"), &got, &want, factor, s.scaled);
        }
        assert!(after == before, "{s:?}: more was written than the live rows");
    }
}

/// A row that the norm turns into known values: with a mean square of one exactly and no epsilon, the norm multiplies by one.
#[test]
fn quantise_nvfp4_after_the_norm_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let kernel = QuantiseNvfp4::load(&device).unwrap();
    let mut random = Random::new();
    // A block of the norm holds a row of at most 9216 in registers.
    for s in Shape::all(&mut random).into_iter().filter(|s| s.cols <= 9216) {
        for parts in 1..=3 {
            let base = factor(&mut random).clamp(1e-20, 1e20);
            let factors: Vec<f32> = [1.0, 1.7, 0.3][..parts].iter().map(|times| base * times).collect();
            run_normed(&device, &kernel, &mut random, s, &factors);
        }
    }
}

fn run_normed(device: &Device, kernel: &QuantiseNvfp4, random: &mut Random, s: Shape, factors: &[f32]) {
    let Shape { live, rows, cols, capacity, .. } = s;
    let (sources, parts) = (rows + 3, factors.len());
    // Signs, so that the mean square is one; the weights are what is rounded, the same for all rows.
    let x: Vec<f32> = (0..sources * cols).map(|_| if random.below(2) == 0 { 1.0 } else { -1.0 }).collect();
    let weight: Vec<f32> = (0..cols / 16).flat_map(|_| block(random, factors[0], false)).collect();
    let mut index: Vec<i32> = (0..rows).map(|_| random.below(sources) as i32).collect();
    (1..rows).step_by(3).for_each(|row| index[row] = -1);
    let mut y = device.allocate::<u16>((capacity.unwrap_or(rows) + 8) * parts * cols).unwrap();
    y.fill(0xff).unwrap();
    let on_device = device.upload(&index).unwrap();
    let call = NormedCall {
        x: &device.upload(&x).unwrap(),
        weight: &device.upload(&weight).unwrap(),
        y: &y,
        live: &device.upload(&[live as i32]).unwrap(),
        index: Some(&on_device),
        rows,
        cols,
        capacity,
        eps: 0.0,
        rounding: Rounding { factors, scaled: s.scaled },
    };
    kernel.normed(device, &call).unwrap();
    let mut after = y.read(0, y.len()).unwrap();
    for (row, &source) in index.iter().enumerate().take(live) {
        for (part, &factor) in factors.iter().enumerate() {
            let places = (0..cols).map(|col| s.place(row, part * cols + col, parts * cols));
            let got: Vec<u16> = places.map(|at| std::mem::replace(&mut after[at], 0xffff)).collect();
            let value = |col: usize| {
                usize::try_from(source).map_or(0.0, |row| f64::from(x[row * cols + col] * weight[col]))
            };
            let values: Vec<f64> = (0..cols).map(value).collect();
            let want: Vec<f64> = values.chunks(16).flat_map(|block| rounded(block, factor)).collect();
            let what = format!("{s:?}, row {row}, part {part}, factor {factor:e}");
            assert_bits(&what, &got, &want, factor, s.scaled);
        }
    }
    assert!(after.iter().all(|&v| v == 0xffff), "{s:?}: more was written than the live rows");
}
