use ctxserve_cuda::driver::Device;
use ctxserve_cuda::ops::gemm_nvfp4::{Call, GemmNvfp4, Output, Plan, Spread};

use crate::common::{Random, assert_rows, device, from_bf16, panel, to_bf16, to_panels};

const BITS: u32 = 0x81c0_81c0;
const MAGNITUDES: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// The pairs of a word of a strip, by kernels/README.md: two codes each, as bf16 numbers have sign, exponent and mantissa.
fn pairs(w: u32) -> [u32; 4] {
    [w, w << 6, w.rotate_left(12), (w << 2) ^ (w >> 6)].map(|bits| bits & BITS)
}

/// A word that has these pairs.
fn word(pairs: [u32; 4]) -> u32 {
    let w = pairs[0] | pairs[1] >> 6 | pairs[2].rotate_right(12);
    let rest = pairs[3] ^ (((w << 2) ^ (w >> 6)) & BITS);
    let mut chain = (rest >> 2) & 0x2020_2020;
    chain ^= chain >> 8;
    chain ^= chain >> 16;
    w | chain | ((rest << 6) & 0x4000_4000) | ((rest >> 2) & 0x0010_0010)
}

/// NVFP4 strips of a matrix.
struct Strips {
    bytes: Vec<u8>,
    cols: usize,
}

impl Strips {
    fn random(random: &mut Random, rows: usize, cols: usize) -> Self {
        let bytes_of_strip = cols / 64 * 576;
        let mut bytes = vec![0; rows / 16 * bytes_of_strip];
        for strip in bytes.chunks_mut(bytes_of_strip) {
            let (codes, scales) = strip.split_at_mut(cols / 64 * 512);
            codes.chunks_mut(8).for_each(|word| word.copy_from_slice(&random.bits().to_le_bytes()));
            // Mostly plain ones, and the least and the greatest there are.
            scales.iter_mut().for_each(|byte| {
                *byte = match random.below(200) {
                    0 => 13 << 3,
                    1 => 25 << 3 | 7,
                    _ => (19 << 3) + random.below(24) as u8,
                }
            });
        }
        Self { bytes, cols }
    }

    /// Zeros, with a one in each row.
    fn of_ones(rows: usize, cols: usize, column: impl Fn(usize) -> usize) -> Self {
        let mut strips = Self { bytes: vec![0; rows / 16 * (cols / 64) * 576], cols };
        for row in 0..rows {
            let col = column(row);
            let (at, pair, second) = strips.place(row, col);
            let mut codes = [0; 4];
            codes[pair] = 2 << 6 << (16 * second);
            strips.bytes[at..at + 4].copy_from_slice(&word(codes).to_le_bytes());
            let scale = strips.scale_place(row, col);
            strips.bytes[scale] = 22 << 3;
        }
        strips
    }

    /// Where a weight's word starts; its pair, and its place in that.
    fn place(&self, row: usize, col: usize) -> (usize, usize, usize) {
        let strip = row / 16 * (self.cols / 64) * 576;
        let lane = row % 8 * 4 + col % 8 / 2;
        let at = strip + col / 64 * 512 + lane * 16 + (col % 64 / 32 * 2 + row % 16 / 8) * 4;
        (at, col % 32 / 8, col % 2)
    }

    fn scale_place(&self, row: usize, col: usize) -> usize {
        let scales = row / 16 * (self.cols / 64) * 576 + self.cols / 64 * 512;
        scales + col / 64 * 64 + row % 8 * 8 + col % 64 / 32 * 4 + row % 16 / 8 * 2 + col % 32 / 16
    }

    fn weight(&self, row: usize, col: usize) -> f64 {
        let (at, pair, second) = self.place(row, col);
        let w = u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap());
        let code = pairs(w)[pair] >> (16 * second);
        let value = MAGNITUDES[(code >> 6 & 7) as usize];
        let scale = self.bytes[self.scale_place(row, col)];
        let scale = f64::from(8 + scale % 8) * 2_f64.powi(i32::from(scale / 8) - 25);
        if code >> 15 & 1 == 1 { -value * scale } else { value * scale }
    }

    fn row(&self, row: usize) -> Vec<f64> {
        (0..self.cols).map(|col| self.weight(row, col)).collect()
    }
}

#[test]
fn gemm_nvfp4_words_hold_their_pairs() {
    let mut random = Random::new();
    for _ in 0..10_000 {
        let wanted = [0; 4].map(|_| random.bits() as u32 & BITS);
        assert_eq!(pairs(word(wanted)), wanted);
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    F32,
    Add,
    SwiGlu,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    /// Tokens to do, and most tokens.
    live: usize,
    tokens: usize,
    cols: usize,
    rows: usize,
    /// More elements between rows of y than there are.
    gap: usize,
    kind: Kind,
}

impl Shape {
    fn capacity(self) -> usize {
        (self.tokens + 9).next_multiple_of(8)
    }
    fn stride(self) -> usize {
        self.rows + self.gap
    }
    fn outs(self) -> usize {
        if self.kind == Kind::SwiGlu { self.rows / 2 } else { self.rows }
    }
}

struct Inputs {
    w: Strips,
    factors: Vec<f32>,
    x: Vec<u16>,
    /// What a float32 y holds before; 5 rows more than tokens.
    before: Vec<f32>,
}

impl Inputs {
    fn random(random: &mut Random, s: Shape) -> Self {
        let factor = (s.cols as f32).sqrt().recip();
        Self {
            w: Strips::random(random, s.rows, s.cols),
            factors: (0..s.rows).map(|_| factor * (1.0 + 0.5 * random.unit())).collect(),
            x: to_bf16(&random.units(s.tokens * s.cols, 1.0)),
            before: random.units((s.tokens + 5) * s.stride(), 8.0),
        }
    }

    /// Element (token, out) by definition, from that token's x.
    fn wanted(&self, s: Shape, token: usize, x: &[f64], out: usize, rows: &[Vec<f64>]) -> f64 {
        let sum = |at: usize, row: usize| {
            f64::from(self.factors[row]) * rows[at].iter().zip(x).map(|(w, x)| w * x).sum::<f64>()
        };
        match s.kind {
            Kind::F32 => sum(0, out),
            Kind::Add => sum(0, out) + f64::from(self.before[token * s.stride() + out]),
            Kind::SwiGlu => {
                let gate = out / 8 * 16 + out % 8;
                let value = sum(0, gate);
                value / (1.0 + (-value).exp()) * sum(1, gate + 8)
            }
        }
    }

    fn token(&self, s: Shape, token: usize) -> Vec<f64> {
        from_bf16(&self.x[token * s.cols..][..s.cols])
    }

    /// The rows of w that an output is made of.
    fn rows_of(&self, s: Shape, out: usize) -> Vec<Vec<f64>> {
        match s.kind {
            Kind::SwiGlu => [0, 8].map(|up| self.w.row(out / 8 * 16 + out % 8 + up)).to_vec(),
            _ => vec![self.w.row(out)],
        }
    }
}

/// The kernels, and the way to use them; as planned if absent.
struct Path {
    gemm: GemmNvfp4,
    plan: Option<Plan>,
}

impl Path {
    fn usual(device: &Device) -> Self {
        Self { gemm: GemmNvfp4::load(device).unwrap(), plan: None }
    }

    fn name(&self) -> String {
        self.plan.map_or("as planned".to_owned(), |plan| plan.to_string())
    }
}

/// Runs it and returns the live tokens' outputs, row-major, widened. Asserts that nothing else was written.
fn run(device: &Device, path: &Path, s: Shape, inputs: &Inputs) -> Vec<f64> {
    let capacity = s.capacity();
    let w = device.upload(&inputs.w.bytes).unwrap();
    let factors = device.upload(&inputs.factors).unwrap();
    let x = device.upload(&to_panels(&inputs.x, s.cols, capacity)).unwrap();
    let live = device.upload(&[s.live as i32]).unwrap();
    let y32 = device.upload(&inputs.before).unwrap();
    // A panel more than there is.
    let mut y16 = device.allocate::<u16>(capacity * (s.rows / 2 + 64)).unwrap();
    y16.fill(0xff).unwrap();
    let call = Call {
        w: &w,
        factors: &factors,
        x: &x,
        y: match s.kind {
            Kind::F32 => Output::F32(&y32),
            Kind::Add => Output::Add(&y32),
            Kind::SwiGlu => Output::SwiGlu(&y16),
        },
        live: &live,
        tokens: s.tokens,
        cols: s.cols,
        rows: s.rows,
        capacity,
        stride: s.stride(),
    };
    match path.plan {
        Some(plan) => path.gemm.issue_as(device, &call, plan).unwrap(),
        None => path.gemm.issue(device, &call).unwrap(),
    }
    let places = || (0..s.live).flat_map(|token| (0..s.outs()).map(move |out| (token, out)));
    if s.kind == Kind::SwiGlu {
        let mut y = y16.read(0, y16.len()).unwrap();
        let got: Vec<u16> = places()
            .map(|(token, out)| std::mem::replace(&mut y[panel(token, out, capacity)], 0xffff))
            .collect();
        assert!(y.iter().all(|&v| v == 0xffff), "{s:?}: more was written than the live tokens");
        return from_bf16(&got);
    }
    let y = y32.read(0, y32.len()).unwrap();
    for (at, (got, before)) in y.iter().zip(&inputs.before).enumerate() {
        let (token, out) = (at / s.stride(), at % s.stride());
        if token >= s.live || out >= s.rows {
            assert_eq!(got, before, "{s:?}: token {token}, column {out} was written");
        }
    }
    places().map(|(token, out)| f64::from(y[token * s.stride() + out])).collect()
}

fn limit(kind: Kind) -> f64 {
    if kind == Kind::SwiGlu { 4e-3 } else { 1e-5 }
}

/// With weights that pick one element of x each, any mistake of layout shows as a value from elsewhere, by name.
fn check_puts_every_element_in_its_place(device: &Device, paths: &[Path]) {
    for tokens in [32, 64, 128, 192, 256, 300] {
        let s = Shape { live: tokens, tokens, cols: 576, rows: 336, gap: 0, kind: Kind::F32 };
        let column = |row: usize| (row * 5 + 3) % s.cols;
        // Small integers, exact in bf16: the low digit of the token and the column of x.
        let x: Vec<f32> =
            (0..tokens * s.cols).map(|at| ((at / s.cols * 7 + at % s.cols) % 251) as f32).collect();
        let inputs = Inputs {
            w: Strips::of_ones(s.rows, s.cols, column),
            factors: vec![1.0; s.rows],
            x: to_bf16(&x),
            before: vec![-1.0; (tokens + 5) * s.stride()],
        };
        for path in paths {
            let got = run(device, path, s, &inputs);
            let wrong: Vec<String> = (0..tokens * s.rows)
                .filter_map(|at| {
                    let (token, out) = (at / s.rows, at % s.rows);
                    let want = f64::from(x[token * s.cols + column(out)]);
                    (got[at] != want).then(|| format!("(token {token}, out {out}): {}, want {want}", got[at]))
                })
                .collect();
            let some = &wrong[..wrong.len().min(12)];
            assert!(wrong.is_empty(), "{}, {tokens}: {} wrong, {some:#?}", path.name(), wrong.len());
        }
    }
}

fn check_equals_its_definition(device: &Device, paths: &[Path]) {
    let mut random = Random::new();
    for (case, (live, tokens)) in [
        (1, 1),
        (3, 17),
        (33, 33),
        (49, 64),
        (65, 100),
        (128, 128),
        (129, 130),
        (200, 256),
        (257, 300),
        (0, 20),
        (9, 600),
    ]
    .into_iter()
    .enumerate()
    {
        for kind in [Kind::F32, Kind::Add, Kind::SwiGlu] {
            let s = Shape {
                live,
                tokens,
                cols: [64, 128, 320, 704, 1024][case % 5],
                rows: if kind == Kind::SwiGlu { [128, 384][case % 2] } else { [16, 80, 336][case % 3] },
                gap: [0, 6][case % 2],
                kind,
            };
            let inputs = Inputs::random(&mut random, s);
            let rows: Vec<_> = (0..s.outs()).map(|out| inputs.rows_of(s, out)).collect();
            let mut want = Vec::new();
            for token in 0..live {
                let x = inputs.token(s, token);
                want.extend((0..s.outs()).map(|out| inputs.wanted(s, token, &x, out, &rows[out])));
            }
            for path in paths {
                let got = run(device, path, s, &inputs);
                assert_rows(&format!("{}, {s:?}", path.name()), &got, &want, s.outs(), limit(kind));
            }
        }
    }
}

/// The model's own shapes, checked at sampled elements.
fn check_of_real_shapes(device: &Device, path: &Path) {
    let mut random = Random::new();
    for (tokens, cols, rows, kind) in [
        (37, 2560, 6144, Kind::F32),
        (64, 9728, 2560, Kind::Add),
        (250, 4096, 2560, Kind::Add),
        (250, 2560, 19_456, Kind::SwiGlu),
        (1000, 2560, 6144, Kind::F32),
    ] {
        let s = Shape { live: tokens, tokens, cols, rows, gap: 0, kind };
        let inputs = Inputs::random(&mut random, s);
        let got = run(device, path, s, &inputs);
        let (mut want, mut sample) = (Vec::new(), Vec::new());
        let outs: Vec<usize> = (0..120).map(|_| random.below(s.outs())).chain([0, s.outs() - 1]).collect();
        for out in outs {
            let rows = inputs.rows_of(s, out);
            for token in (0..10).map(|_| random.below(tokens)).chain([tokens - 1]) {
                want.push(inputs.wanted(s, token, &inputs.token(s, token), out, &rows));
                sample.push(got[token * s.outs() + out]);
            }
        }
        assert_rows(&format!("{s:?}"), &sample, &want, want.len(), limit(kind).max(3e-5));
        assert!(got.iter().all(|v| v.is_finite()));
    }
}

/// A token's bits do not depend on its neighbours, if the way is the same.
fn check_rows_do_not_depend_on_neighbours(device: &Device, path: &Path) {
    let mut random = Random::new();
    let base = Shape { live: 300, tokens: 300, cols: 2560, rows: 256, gap: 0, kind: Kind::F32 };
    let inputs = Inputs::random(&mut random, base);
    let all = run(device, path, base, &inputs);
    for tokens in [20, 90, 170, 299] {
        let s = Shape { live: tokens, tokens, ..base };
        let part = Inputs {
            w: Strips { bytes: inputs.w.bytes.clone(), cols: s.cols },
            factors: inputs.factors.clone(),
            x: inputs.x[..tokens * s.cols].to_vec(),
            before: inputs.before[..(tokens + 5) * s.rows].to_vec(),
        };
        let got = run(device, path, s, &part);
        assert!(got[..] == all[..tokens * s.rows], "{tokens} tokens differ from 300");
    }
}

#[test]
fn gemm_nvfp4_puts_every_element_in_its_place() {
    let Some((device, _turn)) = device() else { return };
    check_puts_every_element_in_its_place(&device, &[Path::usual(&device)]);
}

#[test]
fn gemm_nvfp4_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    check_equals_its_definition(&device, &[Path::usual(&device)]);
}

#[test]
fn gemm_nvfp4_of_real_shapes() {
    let Some((device, _turn)) = device() else { return };
    check_of_real_shapes(&device, &Path::usual(&device));
}

#[test]
fn gemm_nvfp4_portable_passes_the_same() {
    let Some((device, _turn)) = device() else { return };
    let path = [Path { gemm: GemmNvfp4::portable(&device).unwrap(), plan: None }];
    check_puts_every_element_in_its_place(&device, &path);
    check_equals_its_definition(&device, &path);
    check_rows_do_not_depend_on_neighbours(&device, &path[0]);
}

/// Each way on shapes that it would not be planned for, too.
fn check_ways(plans: &[Plan]) {
    let Some((device, _turn)) = device() else { return };
    if !device.facts().is_hopper() {
        println!("skipped: {} is not a Hopper device", device.facts().name);
        return;
    }
    let gemm = GemmNvfp4::load(&device).unwrap();
    let paths: Vec<Path> = plans.iter().map(|&plan| Path { gemm, plan: Some(plan) }).collect();
    check_puts_every_element_in_its_place(&device, &paths);
    check_equals_its_definition(&device, &paths);
    paths.iter().for_each(|path| check_rows_do_not_depend_on_neighbours(&device, path));
}

#[test]
fn gemm_nvfp4_passes_the_same_where_blocks_walk() {
    let of = |spread, height, whole, tail| Plan { height, whole, tail, ..Plan::of(spread) };
    check_ways(&[
        Plan { ahead: 12, ..of(Spread::Low, 64, usize::MAX, 64) },
        of(Spread::Middle, 160, usize::MAX, 160),
        of(Spread::High, 256, usize::MAX, 256),
        of(Spread::High, 192, 1, 48),
        of(Spread::Middle, 96, 1, 32),
    ]);
}

#[test]
fn gemm_nvfp4_passes_the_same_where_blocks_share_columns() {
    let plans: Vec<Plan> = GemmNvfp4::shared_ways().map(Plan::of).collect();
    check_ways(&plans);
}
