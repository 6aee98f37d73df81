use ctxserve_cuda::driver::Device;
use ctxserve_cuda::ops::route::{Call, Normed, Route, Split};

use crate::common::{Random, assert_rows, device, from_bf16, from_f16, to_bf16};

const EPS: f32 = 1e-5;

/// Place of column `col` of a row in fragment order (kernels/README.md).
pub fn fragment(col: usize) -> usize {
    let inside = col % 32;
    col - inside + inside % 8 / 2 * 8 + inside / 8 * 2 + inside % 2
}

struct Case {
    rows: usize,
    hidden: usize,
    experts: usize,
    top_k: usize,
    x: Vec<f32>,
    norm: Vec<f32>,
    router: Vec<u16>,
    bias: Vec<f32>,
}

struct Outcome {
    choice: Vec<i32>,
    weight: Vec<f32>,
    /// Of the ways that write the rows.
    h: Vec<u16>,
    /// Of those that write their scales.
    scale: Vec<f32>,
}

/// How rows are split, and whether the rows are written, not their scales.
type Way = (Split, bool);

/// The ways that there are for so many experts.
fn ways(experts: usize) -> impl Iterator<Item = Way> {
    [
        (Split::Spread, true),
        (Split::One, true),
        (Split::Split, true),
        (Split::Split, false),
        (Split::Many, false),
        (Split::Some, false),
    ]
    .into_iter()
    .filter(move |&(way, _)| way != Split::Some || experts <= 32)
}

impl Case {
    fn random(random: &mut Random, rows: usize, hidden: usize, experts: usize, top_k: usize) -> Self {
        let scale = 10_f32.powf(random.unit() * 2.0);
        Self {
            rows,
            hidden,
            experts,
            top_k,
            x: random.units(rows * hidden, scale),
            norm: random.units(hidden, 2.0),
            router: to_bf16(&random.units(experts * hidden, 0.1)),
            bias: random.units(experts, 1.0),
        }
    }

    fn run(&self, device: &Device, live: usize, (way, rows): Way) -> Outcome {
        let pairs = self.rows * self.top_k;
        let poisoned = |len| {
            let mut buffer = device.allocate::<f32>(len).unwrap();
            buffer.fill(0xa5).unwrap();
            buffer
        };
        let (weight, scale) = (poisoned(pairs + 8), poisoned(self.rows + 8));
        let (mut choice, mut h) = (
            device.allocate::<i32>(pairs + 8).unwrap(),
            device.allocate::<u16>(self.rows * self.hidden + 64).unwrap(),
        );
        choice.fill(0xa5).unwrap();
        h.fill(0xa5).unwrap();
        let call = Call {
            x: &device.upload(&self.x).unwrap(),
            norm: &device.upload(&self.norm).unwrap(),
            router: &device.upload(&self.router).unwrap(),
            bias: &device.upload(&self.bias).unwrap(),
            live: &device.upload(&[live as i32]).unwrap(),
            choice: &choice,
            weight: &weight,
            normed: if rows { Normed::Rows(&h) } else { Normed::Scales(&scale) },
            rows: self.rows,
            hidden: self.hidden,
            experts: self.experts,
            top_k: self.top_k,
            eps: EPS,
        };
        Route::load(device).unwrap().issue_as(device, &call, way).unwrap();
        let outcome = Outcome {
            choice: choice.read(0, choice.len()).unwrap(),
            weight: weight.read(0, weight.len()).unwrap(),
            h: h.read(0, h.len()).unwrap(),
            scale: scale.read(0, scale.len()).unwrap(),
        };
        let poison = 0xa5a5_a5a5_u32;
        let poisoned = |values: &[f32]| values.iter().all(|v| v.to_bits() == poison);
        assert!(
            outcome.choice[live * self.top_k..].iter().all(|&v| v as u32 == poison),
            "choice beyond live"
        );
        assert!(poisoned(&outcome.weight[live * self.top_k..]), "weight beyond live");
        let (of_h, of_scale) = if rows { (live * self.hidden, 0) } else { (0, live) };
        assert!(outcome.h[of_h..].iter().all(|&v| v == 0xa5a5), "h beyond live");
        assert!(poisoned(&outcome.scale[of_scale..]), "scale beyond live");
        outcome
    }

    /// Scale of a row, the normed row and its logits.
    fn reference(&self, row: usize) -> (f64, Vec<f64>, Vec<f64>) {
        let x = &self.x[row * self.hidden..][..self.hidden];
        let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / self.hidden as f64;
        let inverse = 1.0 / (mean + f64::from(EPS)).sqrt();
        let normed: Vec<f64> =
            x.iter().zip(&self.norm).map(|(&v, &w)| f64::from(v) * inverse * f64::from(w)).collect();
        let router = from_bf16(&self.router);
        let logits = router.chunks(self.hidden).zip(&self.bias);
        let logits = logits
            .map(|(w, &b)| w.iter().zip(&normed).map(|(w, v)| w * v).sum::<f64>() + f64::from(b))
            .collect();
        (inverse, normed, logits)
    }

    fn check(&self, outcome: &Outcome, live: usize, (way, rows): Way) {
        let (mut got, mut want) = (Vec::new(), Vec::new());
        let (mut furthest, mut width) = (0.0_f64, self.hidden);
        for row in 0..live {
            let (scale, normed, logits) = self.reference(row);
            if rows {
                let h = from_f16(&outcome.h[row * self.hidden..][..self.hidden]);
                got.extend((0..self.hidden).map(|col| h[fragment(col)]));
                want.extend(normed);
            } else {
                got.push(f64::from(outcome.scale[row]));
                want.push(scale);
                width = 1;
            }
            let choice = &outcome.choice[row * self.top_k..][..self.top_k];
            let mut sorted: Vec<usize> = (0..self.experts).collect();
            sorted.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            for (slot, &chosen) in choice.iter().enumerate() {
                let chosen = chosen as usize;
                assert!(chosen < self.experts, "row {row} chose {chosen}");
                // Rounding may swap near ties, no others.
                let gap = (logits[chosen] - logits[sorted[slot]]).abs();
                assert!(gap < 2e-4, "row {row} slot {slot}: {chosen} for {}, {gap}", sorted[slot]);
                assert!(!choice[..slot].contains(&(chosen as i32)), "row {row} chose {chosen} twice");
            }
            let powers: Vec<f64> =
                choice.iter().map(|&e| (logits[e as usize] - logits[sorted[0]]).exp()).collect();
            let total: f64 = powers.iter().sum();
            let weight = &outcome.weight[row * self.top_k..][..self.top_k];
            for (power, &got) in powers.iter().zip(weight) {
                let want = power / total;
                assert!((want - f64::from(got)).abs() < 1e-4, "row {row}: {got} for {want}");
                furthest = furthest.max((want - f64::from(got)).abs());
            }
        }
        let what = format!("{way:?} {} of {}, weights within {furthest:.1e}", self.rows, self.hidden);
        assert_rows(&what, &got, &want, width, if width == 1 { 1e-6 } else { 5e-4 });
    }
}

#[test]
fn route_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (rows, hidden, experts, top_k) in [
        (1, 64, 1, 1),
        (1, 2880, 32, 4),
        (3, 192, 5, 5),
        (9, 4096, 9, 2),
        (2, 8192, 100, 8),
        (16, 2880, 31, 4),
        (17, 2880, 32, 4),
        (33, 2880, 32, 4),
        (64, 256, 128, 8),
        (65, 320, 33, 4),
        (131, 2880, 128, 4),
        (70, 8192, 16, 2),
        (530, 2880, 32, 4),
    ] {
        let case = Case::random(&mut random, rows, hidden, experts, top_k);
        let live = rows.max(2) - 1;
        ways(experts).for_each(|way| case.check(&case.run(&device, live, way), live, way));
    }
}

#[test]
fn a_row_is_routed_alike_alone_and_among_others() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (rows, some, experts) in [(64, 1, 32), (150, 71, 32), (40, 3, 100)] {
        let many = Case::random(&mut random, rows, 2880, experts, 4);
        for way in ways(experts) {
            let together = many.run(&device, rows, way);
            for first in [0, 7, rows - some] {
                let few = Case {
                    rows: some,
                    x: many.x[first * 2880..][..some * 2880].to_vec(),
                    norm: many.norm.clone(),
                    router: many.router.clone(),
                    bias: many.bias.clone(),
                    ..many
                };
                let few = few.run(&device, some, way);
                assert_eq!(few.choice[..some * 4], together.choice[first * 4..][..some * 4]);
                assert_eq!(few.weight[..some * 4], together.weight[first * 4..][..some * 4]);
                assert_eq!(few.h[..some * 2880], together.h[first * 2880..][..some * 2880]);
                let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&few.scale[..some]), bits(&together.scale[first..][..some]));
            }
        }
    }
}

#[test]
fn equal_logits_go_to_the_lowest_experts() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let mut case = Case::random(&mut random, 66, 128, 40, 4);
    // Experts 3, 9, 17, 35 and 39 are one expert; its bias puts it above the rest.
    for expert in [9, 17, 35, 39] {
        case.router.copy_within(3 * 128..4 * 128, expert * 128);
    }
    for expert in [3, 9, 17, 35, 39] {
        case.bias[expert] = 1000.0;
    }
    for way in ways(40) {
        let outcome = case.run(&device, 66, way);
        for row in 0..66 {
            assert_eq!(outcome.choice[row * 4..][..4], [3, 9, 17, 35], "{way:?}");
            assert_eq!(outcome.weight[row * 4..][..4], [0.25; 4], "{way:?}");
        }
    }
}

#[test]
fn a_row_that_is_not_a_number_stays_in_bounds_and_alone() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (way, rows) in ways(32).flat_map(|way| [(way, 3), (way, 67)]) {
        let mut case = Case::random(&mut random, rows, 192, 32, 4);
        let clean = case.run(&device, rows, way);
        case.x[192 + 5] = f32::NAN;
        let outcome = case.run(&device, rows, way);
        assert_eq!(outcome.choice[4..8], [0, 1, 2, 3]);
        assert!(outcome.weight[4..8].iter().all(|weight| weight.is_nan()));
        for row in (0..rows).filter(|&row| row != 1) {
            assert_eq!(outcome.choice[row * 4..][..4], clean.choice[row * 4..][..4]);
            assert_eq!(outcome.weight[row * 4..][..4], clean.weight[row * 4..][..4]);
        }
    }
}
