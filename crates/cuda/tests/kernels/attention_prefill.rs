use ctxserve_cuda::driver::Device;
use ctxserve_cuda::ops::attention::{HEAD_DIMS, Sequences};
use ctxserve_cuda::ops::attention_prefill::{AttentionPrefill, Call};
use ctxserve_cuda::ops::kv_gather::lines_of;
use half::bf16;

use crate::attention::{Paged, Shape, sinks};
use crate::common::{Random, assert_rows, device, from_bf16, panel, to_bf16};

#[derive(Clone, Copy, Debug)]
struct Case {
    window: Option<usize>,
    kv_heads: usize,
    group: usize,
    sinks: bool,
    panels: bool,
    /// Elements of a head.
    dim: usize,
    /// Scores grow this much larger.
    steep: f32,
}

/// `parts`: position of the first row, and rows, of each sequence after one that takes no part. Every `step`-th row is compared.
fn check(
    device: &Device,
    random: &mut Random,
    kernel: &AttentionPrefill,
    case: Case,
    parts: &[(usize, usize)],
    step: usize,
) {
    let Case { window, kv_heads, group, dim, .. } = case;
    let name = format!("{case:?} {parts:?}");
    let heads = kv_heads * group;
    let width = heads * dim;
    let shape = Shape { page_size: 16, kv_heads, fp8: false, window, dim };
    let seen = |start: usize| window.map_or(0, |window| (start + 1).saturating_sub(window));
    let sequences: Vec<_> = parts.iter().map(|&(start, rows)| (seen(start), start + rows)).collect();
    let mut paged = Paged::new(random, shape, &sequences);
    let lines: usize = parts.iter().map(|&(start, rows)| lines_of(start, rows, window)).sum::<usize>() + 128;
    // What is beyond a sequence's padding is poison.
    let mut scratch = [(); 2].map(|()| vec![0xffff_u16; kv_heads * lines * dim]);
    let mut line = 0;
    for (sequence, &(first, len)) in sequences.iter().enumerate() {
        paged.fill(random, sequence, first..len);
        let (start, rows) = parts[sequence];
        let end = line + lines_of(start, rows, window);
        for (position, line) in (first..).zip(line..end) {
            for head in 0..kv_heads {
                for (kind, scratch) in scratch.iter_mut().enumerate() {
                    for d in 0..dim {
                        let panel = head * (dim / 64) + d / 64;
                        let at = (panel * lines + line) * 64 + ((d % 64 / 8) ^ (line % 8)) * 8 + d % 8;
                        let value =
                            paged.tokens[sequence].get(position).map_or(0.0, |token| token[head][kind][d]);
                        scratch[at] = bf16::from_f64(value).to_bits();
                    }
                }
            }
        }
        line = end;
    }
    // Rows of other sequences lie before, between and after.
    let mut first_row = Vec::new();
    let mut rows = 3;
    for part in parts {
        first_row.push(rows);
        rows += part.1 + random.below(3);
    }
    rows += 2;
    let loud = 2_f32.powf(random.unit() * 2.0);
    let q = to_bf16(&random.units(rows * width, loud));
    let sinks = sinks(random, heads);
    let scale = case.steep * 0.125 * 2_f32.powf(random.unit());
    let capacity = rows.next_multiple_of(8) + 8;
    let mut out = device.allocate::<u16>(capacity * width).unwrap();
    out.fill(0xff).unwrap();
    let ints = |values: &mut dyn Iterator<Item = usize>| {
        device.upload(&std::iter::once(i32::MIN).chain(values.map(|v| v as i32)).collect::<Vec<_>>()).unwrap()
    };
    let sinks_on_device = device.upload(&sinks).unwrap();
    let call = Call {
        q: &device.upload(&q).unwrap(),
        keys: &device.upload(&scratch[0]).unwrap(),
        values: &device.upload(&scratch[1]).unwrap(),
        sequences: Sequences {
            first: 1,
            count: parts.len(),
            first_row: &ints(&mut first_row.iter().copied()),
            row_count: &ints(&mut parts.iter().map(|part| part.1)),
            start: &ints(&mut parts.iter().map(|part| part.0)),
        },
        sinks: Some(&sinks_on_device).filter(|_| case.sinks),
        out: &out,
        runs: parts.iter().map(|part| kernel.runs_of(part.1)).sum::<usize>() + 1,
        rows,
        heads,
        kv_heads,
        lines,
        window,
        capacity: Some(capacity).filter(|_| case.panels),
        scale,
    };
    kernel.issue(device, &call).unwrap();
    let bits = out.read(0, capacity * width).unwrap();
    let index =
        |row: usize, col: usize| if case.panels { panel(row, col, capacity) } else { row * width + col };
    let q = from_bf16(&q);
    let (mut got, mut want, mut ours) = (Vec::new(), Vec::new(), vec![false; capacity]);
    for (sequence, &(start, count)) in parts.iter().enumerate() {
        let first = first_row[sequence];
        ours[first..first + count].fill(true);
        for n in (0..count).filter(|n| n % step == 0 || *n + 1 == count) {
            for head in (0..heads).filter(|head| step == 1 || random.below(heads) <= 4 || *head == 0) {
                let (row, at) = (first + n, head * dim);
                let sink = case.sinks.then(|| f64::from(sinks[head]));
                let q = &q[row * width + at..][..dim];
                let mut line = paged.attend(sequence, start + n, head / group, q, f64::from(scale), sink);
                let bits: Vec<u16> = (at..at + dim).map(|col| bits[index(row, col)]).collect();
                let mut line_got = from_bf16(&bits);
                line.push(1e-4);
                line_got.push(1e-4);
                want.extend(line);
                got.extend(line_got);
            }
        }
    }
    assert_rows(&name, &got, &want, dim + 1, 8e-3);
    for row in 0..capacity {
        let written = (0..width).filter(|&col| bits[index(row, col)] != 0xffff).count();
        assert!(ours[row] || written == 0, "{name}: row {row} of another sequence was written");
    }
}

fn suite(kernel: &AttentionPrefill, device: &Device, random: &mut Random, dim: usize) {
    let base = Case { window: None, kv_heads: 1, group: 2, sinks: true, panels: true, dim, steep: 1.0 };
    let cases = [
        base,
        Case { window: Some(128), ..base },
        Case { window: Some(20), sinks: false, panels: false, ..base },
        Case { kv_heads: 2, group: 1, sinks: false, ..base },
        Case { kv_heads: 1, group: 8, ..base },
        Case { kv_heads: 2, group: 4, panels: false, ..base },
        Case { kv_heads: 1, group: 8, window: Some(128), ..base },
        Case { kv_heads: 1, group: 8, window: Some(20), panels: false, ..base },
        Case { kv_heads: 1, group: 3, ..base },
        Case { kv_heads: 1, group: 8, steep: 16.0, ..base },
        Case { kv_heads: 1, group: 8, steep: 64.0, window: Some(200), ..base },
    ];
    for case in cases {
        check(device, random, kernel, case, &[(0, 1), (0, 2), (17, 16), (5, 63), (0, 64), (0, 65)], 1);
        check(device, random, kernel, case, &[(0, 127), (1, 128), (128, 129), (0, 257), (300, 5)], 5);
        check(device, random, kernel, case, &[(1000, 130), (0, 400), (127, 1), (64, 192), (2, 193)], 7);
    }
    // More sequences than a block has threads, and one of a real length.
    let many: Vec<_> = (0..520).map(|n| (n % 3, 1 + n % 4)).collect();
    check(device, random, kernel, base, &many, 3);
    check(device, random, kernel, Case { kv_heads: 2, group: 8, ..base }, &[(1000, 2000)], 97);
    check(
        device,
        random,
        kernel,
        Case { kv_heads: 2, group: 8, window: Some(128), ..base },
        &[(1000, 2000)],
        97,
    );
}

#[test]
fn attention_prefill_portable_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let random = &mut Random::new();
    for dim in HEAD_DIMS {
        suite(&AttentionPrefill::load_portable(&device, dim).unwrap(), &device, random, dim);
    }
}

#[test]
fn attention_prefill_hopper_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    if !device.facts().is_hopper() {
        println!("skipped: {} is no Hopper device", device.facts().name);
        AttentionPrefill::load_hopper(&device, 64).unwrap_err();
        return;
    }
    let random = &mut Random::new();
    for dim in HEAD_DIMS {
        suite(&AttentionPrefill::load_hopper(&device, dim).unwrap(), &device, random, dim);
    }
}
