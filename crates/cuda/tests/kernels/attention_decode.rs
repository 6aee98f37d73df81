use ctxserve_cuda::driver::Device;
use ctxserve_cuda::ops::attention_decode::{AttentionDecode, Call, Queries, Workspace, splits};

use crate::attention::{Paged, Shape, sinks};
use crate::common::{Random, assert_rows, device, from_bf16, panel, to_bf16};

#[derive(Clone, Copy, Debug)]
struct Case {
    shape: Shape,
    group: usize,
    splits: usize,
    sinks: bool,
    /// Output in panels.
    panels: bool,
    /// The new token comes with the call; else it is in the cache already.
    appends: bool,
}

const FULL: Shape = Shape { page_size: 16, kv_heads: 2, fp8: true, window: None, dim: 64 };

fn check(device: &Device, random: &mut Random, case: Case, lengths: &[usize]) {
    let Case { shape, group, splits, .. } = case;
    let dim = shape.dim;
    let (live, heads) = (lengths.len(), shape.kv_heads * group);
    let (rows, width, kv_width) = (live + 2, heads * dim, shape.kv_heads * dim);
    let name = format!("{case:?} {lengths:?}");
    let first = |len: usize| shape.window.map_or(0, |window| len.saturating_sub(window));
    let sequences: Vec<_> = lengths.iter().map(|&len| (first(len), len)).collect();
    let mut paged = Paged::new(random, shape, &sequences);
    let mut kv = vec![f32::NAN; rows * 2 * kv_width];
    for (row, &(first, len)) in sequences.iter().enumerate() {
        paged.fill(random, row, first..len - 1);
        let (keys, values) = (random.units(kv_width, 3.0), random.units(kv_width, 2.0));
        paged.put(row, len - 1, &keys, &values, !case.appends);
        kv[row * 2 * kv_width..][..kv_width].copy_from_slice(&keys);
        kv[row * 2 * kv_width + kv_width..][..kv_width].copy_from_slice(&values);
    }
    let loud = 2_f32.powf(random.unit() * 3.0);
    let mut q = to_bf16(&random.units(live * width, loud));
    q.resize(rows * width, 0x7fff);
    // Rows that are not live have nonsense for numbers.
    let padded = |values: &mut dyn Iterator<Item = i32>| -> Vec<i32> {
        let mut values: Vec<i32> = values.collect();
        values.resize(rows, i32::MIN);
        values
    };
    let position = padded(&mut lengths.iter().map(|&len| len as i32 - 1));
    let slot = padded(&mut (0..live).map(|row| paged.slot(row, lengths[row] - 1) as i32));
    (paged.table_at, paged.table_first) =
        (padded(&mut paged.table_at.iter().copied()), padded(&mut paged.table_first.iter().copied()));
    let sinks = sinks(random, heads);
    let scale = 0.125 * 2_f32.powf(random.unit());
    let capacity = rows.next_multiple_of(8);
    let on_device = paged.upload(device);
    let [position, slot] = [position, slot].map(|values| device.upload(&values).unwrap());
    let (live_count, sinks_on_device) =
        (device.upload(&[live as i32]).unwrap(), device.upload(&sinks).unwrap());
    let (q_on_device, kv_on_device) = (device.upload(&q).unwrap(), device.upload(&kv).unwrap());
    let workspace = Workspace::new_for(device, dim, rows, shape.kv_heads, splits).unwrap();
    let mut out = device.allocate::<u16>(capacity * width).unwrap();
    let kernel = AttentionDecode::load_for(device, dim).unwrap();
    let mut runs = Vec::new();
    for _ in 0..2 {
        out.fill(0xff).unwrap();
        let call = Call {
            queries: Queries::Rotated { q: &q_on_device, kv: Some(&kv_on_device).filter(|_| case.appends) },
            cache: on_device.cache,
            tables: on_device.tables(),
            position: &position,
            slot: &slot,
            live: &live_count,
            sinks: Some(&sinks_on_device).filter(|_| case.sinks),
            out: &out,
            workspace: &workspace,
            rows,
            heads,
            splits,
            capacity: Some(capacity).filter(|_| case.panels),
            scale,
        };
        kernel.issue(device, &call).unwrap();
        runs.push(out.read(0, capacity * width).unwrap());
    }
    assert_eq!(runs[0], runs[1], "{name}: two runs differ");

    // The cache: the new tokens are there, and nothing else changed.
    let mut want = paged.bytes.clone();
    if case.appends {
        for (row, &len) in lengths.iter().enumerate() {
            for head in 0..shape.kv_heads {
                for (of_values, at) in [(false, 0), (true, kv_width)] {
                    let (data, scale) = paged.places(paged.slot(row, len - 1), head, of_values);
                    let values = &kv[row * 2 * kv_width + at + head * dim..][..dim];
                    let stored = crate::attention::round(values, shape.fp8);
                    want[data].copy_from_slice(&stored.bytes);
                    if shape.fp8 {
                        want[scale].copy_from_slice(&stored.scale.to_le_bytes());
                    }
                }
            }
        }
    }
    let got = on_device.read();
    let wrong = got.iter().zip(&want).filter(|(got, want)| got != want).count();
    assert_eq!(wrong, 0, "{name}: bytes of the cache differ");

    let index =
        |row: usize, col: usize| if case.panels { panel(row, col, capacity) } else { row * width + col };
    let rest = |row: usize| (0..width).all(|col| runs[0][index(row, col)] == 0xffff);
    assert!((live..capacity).all(rest), "{name}: rows beyond the live ones were written");
    let (mut got, mut want) = (Vec::new(), Vec::new());
    let q = from_bf16(&q);
    for (row, &len) in lengths.iter().enumerate() {
        for (head, &sink) in sinks.iter().enumerate().take(heads) {
            let at = head * dim;
            let sink = case.sinks.then(|| f64::from(sink));
            let q = &q[row * width + at..][..dim];
            let mut line = paged.attend(row, len - 1, head / group, q, f64::from(scale), sink);
            let bits: Vec<u16> = (at..at + dim).map(|col| runs[0][index(row, col)]).collect();
            let mut line_got = from_bf16(&bits);
            // Where the sink takes all, what is left is too small to compare by its own size.
            line.push(1e-4);
            line_got.push(1e-4);
            want.extend(line);
            got.extend(line_got);
        }
    }
    assert_rows(&name, &got, &want, dim + 1, 8e-3);
}

#[test]
fn attention_decode_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let edges = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130, 257];
    for fp8 in [true, false] {
        for (window, page_size, splits) in [
            (None, 16, 8),
            (None, 16, 2),
            (None, 64, 24),
            (None, 64, 1),
            (None, 32, 7),
            (Some(128), 16, 1),
            (Some(128), 64, 2),
            (Some(20), 16, 1),
        ] {
            for (group, kv_heads, sinks, appends) in
                [(8, 2, true, true), (4, 1, false, true), (1, 3, true, false)]
            {
                let shape = Shape { page_size, kv_heads, fp8, window, dim: 64 };
                let case = Case { shape, group, splits, sinks, panels: sinks && appends, appends };
                let lengths: Vec<usize> = edges.iter().map(|&edge| edge + 128 * random.below(2)).collect();
                check(&device, &mut random, case, &lengths);
            }
        }
    }
}

#[test]
fn attention_decode_takes_heads_of_128() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let edges = [1, 2, 15, 16, 17, 31, 33, 65, 127, 128, 129, 257, 1000];
    for fp8 in [true, false] {
        for (page_size, splits, group, kv_heads, appends, window) in [
            (16, 8, 4, 2, true, None),
            (64, 2, 4, 1, true, None),
            (64, 24, 8, 1, false, None),
            (32, 1, 4, 8, true, None),
            (256, 7, 1, 2, true, None),
            (16, 1, 4, 2, true, Some(128)),
        ] {
            let shape = Shape { page_size, kv_heads, fp8, window, dim: 128 };
            let case = Case { shape, group, splits, sinks: !appends, panels: group == 4, appends };
            check(&device, &mut random, case, &edges);
        }
    }
    let shape = Shape { page_size: 64, kv_heads: 8, fp8: true, window: None, dim: 128 };
    let case = Case { shape, group: 4, splits: 4, sinks: false, panels: true, appends: true };
    let lengths: Vec<usize> =
        (0..40).map(|row| 1 + random.below(200) + if row == 3 { 3000 } else { 0 }).collect();
    check(&device, &mut random, case, &lengths);
}

#[test]
fn attention_decode_holds_for_long_rows() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (fp8, splits, page_size) in [
        (true, 33, 16),
        (true, 5, 256),
        (false, 16, 64),
        (true, 1, 64),
        (true, 32, 64),
        (true, 4, 16),
        (false, 6, 16),
    ] {
        let shape = Shape { page_size, fp8, ..FULL };
        let case = Case { shape, group: 8, splits, sinks: true, panels: true, appends: true };
        check(&device, &mut random, case, &[5000, 1000, 1, 2048, 2049]);
    }
}

#[test]
fn attention_decode_at_the_models_shape() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for window in [None, Some(128)] {
        let shape = Shape { page_size: 64, kv_heads: 8, fp8: window.is_none(), window, dim: 64 };
        let lengths: Vec<usize> = (0..20).map(|_| 1 + random.below(700)).collect();
        let case = Case { shape, group: 8, splits: 2, sinks: true, panels: true, appends: true };
        check(&device, &mut random, case, &lengths);
    }
}

#[test]
fn attention_decode_refuses_what_does_not_fit() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let paged = Paged::new(&mut random, FULL, &[(0, 5)]).upload(&device);
    let kernel = AttentionDecode::load(&device).unwrap();
    let (ints, halves) = (device.zeros::<i32>(4).unwrap(), device.zeros::<u16>(4096).unwrap());
    let workspace = Workspace::new(&device, 1, 2, 4).unwrap();
    let issue = |rows: usize, heads: usize, splits: usize, page_size: usize| {
        let call = Call {
            queries: Queries::Rotated { q: &halves, kv: None },
            cache: ctxserve_cuda::ops::attention::Cache { page_size, ..paged.cache },
            tables: paged.tables(),
            position: &ints,
            slot: &ints,
            live: &ints,
            sinks: None,
            out: &halves,
            workspace: &workspace,
            rows,
            heads,
            splits,
            capacity: None,
            scale: 1.0,
        };
        kernel.issue(&device, &call)
    };
    // No row is live, so what fits does nothing.
    issue(1, 16, 4, 16).unwrap();
    device.synchronize().unwrap();
    for (rows, heads, splits, page_size) in [
        (2, 16, 4, 16),
        (1, 18, 4, 16),
        (1, 3, 4, 16),
        (1, 16, 5, 16),
        (1, 16, 4, 24),
        (0, 16, 4, 16),
        (1, 16, 0, 16),
    ] {
        issue(rows, heads, splits, page_size).unwrap_err();
    }
}

#[test]
fn attention_decode_holds_for_many_rows() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let shape = Shape { page_size: 64, kv_heads: 8, ..FULL };
    for (group, splits) in [(8, 4), (2, 1)] {
        let lengths: Vec<usize> =
            (0..40).map(|row| 1 + random.below(300) + if row % 19 == 3 { 4700 } else { 0 }).collect();
        let case = Case { shape, group, splits, sinks: true, panels: true, appends: true };
        check(&device, &mut random, case, &lengths);
    }
}

#[test]
fn splits_fill_the_device() {
    let cache = |window| ctxserve_cuda::ops::attention::Cache {
        data: 0,
        scales: 0,
        page_size: 16,
        kv_heads: 8,
        window,
    };
    assert_eq!(splits(1, &cache(None), 132), 24);
    assert_eq!(splits(2, &cache(None), 132), 8);
    assert_eq!(splits(4, &cache(None), 132), 6);
    assert_eq!(splits(16, &cache(None), 132), 4);
    assert_eq!(splits(256, &cache(None), 132), 2);
    assert_eq!(splits(1, &cache(Some(128)), 132), 1);
    assert!(splits(1, &cache(Some(4096)), 132) > 1);
    // What fewer rows use fits into the memory for more.
    for rows in 1..300 {
        let most = splits(rows, &cache(None), 132);
        let room = Workspace::bytes(300, 8, 4);
        assert!(Workspace::bytes(rows, 8, most) <= room);
    }
}
