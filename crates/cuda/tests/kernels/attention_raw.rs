use ctxserve_cuda::driver::{Buffer, Device};
use ctxserve_cuda::ops::attention::HeadNorms;
use ctxserve_cuda::ops::attention_decode::{AttentionDecode, Call, Queries, Workspace};
use ctxserve_cuda::ops::kv_append::{self, KvAppend};

use crate::attention::{Paged, Shape, sinks};
use crate::common::{Random, device};

#[derive(Clone, Copy, Debug)]
struct Case {
    shape: Shape,
    group: usize,
    norms: bool,
    sinks: bool,
}

/// Attention over raw rows gives the bits that `kv_append` and attention over its outputs give, and leaves the same cache. The last row
/// attends to its token where that is stored nowhere, too.
fn check(device: &Device, random: &mut Random, case: Case, splits: &[usize], lengths: &[usize]) {
    let Case { shape, group, .. } = case;
    let Shape { dim, kv_heads, .. } = shape;
    let (live, heads) = (lengths.len(), kv_heads * group);
    let (rows, width, raw_width) = (live + 2, heads * dim, (heads + 2 * kv_heads) * dim);
    let name = format!("{case:?} {lengths:?}");
    let first = |len: usize| shape.window.map_or(0, |window| len.saturating_sub(window));
    let sequences: Vec<_> = lengths.iter().map(|&len| (first(len), len)).collect();
    let mut paged = Paged::new(random, shape, &sequences);
    for (row, &(first, len)) in sequences.iter().enumerate() {
        paged.fill(random, row, first..len - 1);
    }
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
    let mut qkv = random.units(live * raw_width, 3.0);
    qkv.resize(rows * raw_width, f32::NAN);
    let inv_freq: Vec<f32> =
        (0..dim / 2).map(|i| 5_000_000_f64.powf(-2.0 * i as f64 / dim as f64) as f32).collect();
    let [q_weights, k_weights] = [(); 2].map(|()| device.upload(&random.units(dim, 2.0)).unwrap());
    let norms = case.norms.then_some(HeadNorms { q: &q_weights, k: &k_weights, eps: 0.1 });
    let sinks = device.upload(&sinks(random, heads)).unwrap();
    let (qkv, inv_freq) = (device.upload(&qkv).unwrap(), device.upload(&inv_freq).unwrap());
    let (position, live_count) = (device.upload(&position).unwrap(), device.upload(&[live as i32]).unwrap());
    let slots = device.upload(&slot).unwrap();
    let mscale = 1.25;
    let most = splits.iter().copied().max().unwrap_or(1);
    let workspace = Workspace::new_for(device, dim, rows, kv_heads, most).unwrap();
    let kernel = AttentionDecode::load_for(device, dim).unwrap();
    let capacity = rows.next_multiple_of(8);
    let attend = |queries: Queries<'_>, slot: &Buffer<i32>, splits: usize| {
        let on_device = paged.upload(device);
        if let Queries::Rotated { q, .. } = queries {
            let call = kv_append::Call {
                qkv: &qkv,
                q,
                cache: on_device.cache,
                position: &position,
                slot,
                live: &live_count,
                inv_freq: &inv_freq,
                norms,
                mscale,
                rows,
                heads,
            };
            KvAppend::load_for(device, dim).unwrap().issue(device, &call).unwrap();
        }
        let mut out = device.allocate::<u16>(capacity * width).unwrap();
        out.fill(0xff).unwrap();
        let call = Call {
            queries,
            cache: on_device.cache,
            tables: on_device.tables(),
            position: &position,
            slot,
            live: &live_count,
            sinks: Some(&sinks).filter(|_| case.sinks),
            out: &out,
            workspace: &workspace,
            rows,
            heads,
            splits,
            capacity: Some(capacity),
            scale: 0.1,
        };
        kernel.issue(device, &call).unwrap();
        (out.read(0, capacity * width).unwrap(), on_device.read())
    };
    let q = device.zeros::<u16>(rows * width).unwrap();
    let raw = Queries::Raw { qkv: &qkv, norms, inv_freq: &inv_freq, mscale };
    let differ = |got: &[u16], want: &[u16]| got.iter().zip(want).filter(|(got, want)| got != want).count();
    let mut without = slot.clone();
    without[live - 1] = -1;
    let without = device.upload(&without).unwrap();
    for &splits in splits {
        let name = format!("{name}, {splits} splits");
        let (want, mut want_cache) = attend(Queries::Rotated { q: &q, kv: None }, &slots, splits);
        let (got, got_cache) = attend(raw, &slots, splits);
        assert!(want_cache != paged.bytes, "{name}: nothing was appended");
        let wrong = got_cache.iter().zip(&want_cache).filter(|(got, want)| got != want).count();
        assert_eq!(wrong, 0, "{name}: bytes of the cache differ");
        assert_eq!(differ(&got, &want), 0, "{name}: outputs differ");
        let numbers = want[..].iter().filter(|&&bits| bits != 0xffff && bits & 0x7fff != 0).count();
        assert!(numbers > live * width / 2, "{name}: {numbers} outputs");
        let (got, got_cache) = attend(raw, &without, splits);
        assert_eq!(differ(&got, &want), 0, "{name}: a token that is not stored is not seen");
        for head in 0..kv_heads {
            for of_values in [false, true] {
                let (data, scale) =
                    paged.places(paged.slot(live - 1, lengths[live - 1] - 1), head, of_values);
                want_cache[data.clone()].copy_from_slice(&paged.bytes[data]);
                want_cache[scale.clone()].copy_from_slice(&paged.bytes[scale]);
            }
        }
        assert!(got_cache == want_cache, "{name}: a token without a slot was stored");
    }
    println!("{name}: equal");
}

#[test]
fn attention_decode_of_raw_rows_equals_append_and_attend() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let base = Shape { page_size: 16, kv_heads: 2, fp8: true, window: None, dim: 128 };
    for (dim, group) in [(128, 4), (64, 8), (128, 8), (64, 3), (128, 1)] {
        for (fp8, window) in [(true, None), (false, None), (true, Some(40)), (false, Some(128))] {
            let shape = Shape { fp8, window, dim, ..base };
            let case = Case { shape, group, norms: group != 8, sinks: group == 8 };
            let (longest, last) = (500 + random.below(300), 1 + random.below(300));
            let lengths = [1, 2, 16, 17, 33, longest, 257, last];
            check(&device, &mut random, case, &[1, 2, 5, 8, 24], &lengths);
        }
    }
}

#[test]
fn attention_decode_of_raw_rows_at_the_models_shape() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (rows, fp8, splits) in
        [(1, true, 24), (3, false, 8), (16, true, 4), (17, true, 4), (80, true, 4), (5, false, 2)]
    {
        let shape = Shape { page_size: 64, kv_heads: 8, fp8, window: None, dim: 128 };
        let lengths: Vec<usize> = (0..rows).map(|_| 1 + random.below(160)).collect();
        let case = Case { shape, group: 4, norms: true, sinks: false };
        check(&device, &mut random, case, &[splits], &lengths);
    }
}
