use ctxserve_cuda::ops::attention::HEAD_DIM;
use ctxserve_cuda::ops::kv_append::{Call, HeadNorms, KvAppend, StoreCall};

use crate::attention::{Paged, Shape, round};
use crate::common::{Random, assert_rows, device, from_bf16};

/// Frequencies of gpt-oss without the long-context correction: from whole turns a token to a thousandth of one in all.
fn frequencies(dim: usize) -> Vec<f32> {
    (0..dim / 2).map(|i| 150_000_f64.powf(-2.0 * i as f64 / dim as f64) as f32).collect()
}

/// A head in the order of the QKV rows over the root of its mean square, times weights in natural order, rounded to float32 as a kernel's.
fn normed(head: &[f32], weights: &[f32], eps: f32) -> Vec<f32> {
    let mean = head.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / head.len() as f64;
    let factor = (mean + f64::from(eps)).sqrt().recip();
    let natural = |at: usize| at / 2 + at % 2 * head.len() / 2;
    head.iter()
        .enumerate()
        .map(|(at, &v)| (f64::from(v) * factor * f64::from(weights[natural(at)])) as f32)
        .collect()
}

/// A head in the order of the QKV rows, rotated into natural order, in float64 from an angle in float32.
fn rotate(head: &[f32], position: i32, inv_freq: &[f32], mscale: f32) -> Vec<f64> {
    let half = head.len() / 2;
    let mut out = vec![0.0; head.len()];
    for i in 0..half {
        let (sin, cos) = f64::from(position as f32 * inv_freq[i]).sin_cos();
        let (sin, cos) = (sin * f64::from(mscale), cos * f64::from(mscale));
        let (x, y) = (f64::from(head[2 * i]), f64::from(head[2 * i + 1]));
        (out[i], out[i + half]) = (x * cos - y * sin, y * cos + x * sin);
    }
    out
}

#[test]
fn kv_append_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (fp8, heads, kv_heads, page_size, rows, dim, norms) in [
        (true, 64, 8, 64, 37, 64, false),
        (false, 64, 8, 16, 9, 64, false),
        (true, 3, 1, 16, 5, 64, false),
        (false, 4, 2, 32, 1, 64, false),
        (true, 16, 4, 256, 3, 64, false),
        (true, 96, 8, 32, 2, 64, false),
        (true, 32, 8, 64, 9, 128, false),
        (false, 32, 8, 16, 3, 128, false),
        (true, 3, 1, 32, 5, 128, false),
        (true, 32, 8, 64, 17, 128, true),
        (false, 32, 8, 16, 4, 128, true),
        (true, 3, 1, 32, 5, 128, true),
        (true, 3, 1, 16, 5, 64, true),
        (false, 16, 3, 32, 6, 64, true),
        // Queries are somebody else's.
        (true, 0, 8, 64, 9, 64, false),
        (false, 0, 2, 16, 3, 128, true),
    ] {
        let shape = Shape { page_size, kv_heads, fp8, window: None, dim };
        let (live, width) = (rows.max(2) - 1, (heads + 2 * kv_heads) * dim);
        // One sequence of all rows, so that slots cross pages; positions of their own, up to the longest context.
        let paged = Paged::new(&mut random, shape, &[(0, rows + 3)]);
        let on_device = paged.upload(&device);
        let qkv = random.units(rows * width, 4.0);
        let position: Vec<i32> =
            (0..rows).map(|row| if row == 0 { 131_071 } else { random.below(131_072) as i32 }).collect();
        let mut slot: Vec<i32> = (0..rows).map(|row| paged.slot(0, row + 2) as i32).collect();
        if rows > 4 {
            slot[3] = -1;
        }
        let inv_freq = frequencies(dim);
        let mscale = 1.346_573_6;
        // Of uneven size, so that one for the other, or an epsilon left out, is seen.
        let (eps, weights) = (0.25, [random.units(dim, 1.5), random.units(dim, 3.0)]);
        let on_device_weights = weights.clone().map(|weights| device.upload(&weights).unwrap());
        let mut q = device.allocate::<u16>((rows + 1) * heads.max(1) * dim).unwrap();
        q.fill(0xff).unwrap();
        let call = Call {
            qkv: &device.upload(&qkv).unwrap(),
            q: &q,
            cache: on_device.cache,
            position: &device.upload(&position).unwrap(),
            slot: &device.upload(&slot).unwrap(),
            live: &device.upload(&[live as i32]).unwrap(),
            inv_freq: &device.upload(&inv_freq).unwrap(),
            norms: norms.then(|| HeadNorms { q: &on_device_weights[0], k: &on_device_weights[1], eps }),
            mscale,
            rows,
            heads,
        };
        KvAppend::load_for(&device, dim).unwrap().issue(&device, &call).unwrap();
        let got = q.read(0, q.len()).unwrap();
        let q_width = heads * dim;
        assert!(got[live * q_width..].iter().all(|&v| v == 0xffff), "rows beyond the live ones were written");
        let turned = |row: usize, head: usize| {
            let raw = &qkv[row * width + head * dim..][..dim];
            let weights = &weights[usize::from(head >= heads)];
            let head = if norms { normed(raw, weights, eps) } else { raw.to_vec() };
            rotate(&head, position[row], &inv_freq, mscale)
        };
        let want: Vec<f64> =
            (0..live).flat_map(|row| (0..heads).flat_map(move |head| turned(row, head))).collect();
        let name =
            format!("kv_append fp8 {fp8}, {heads} over {kv_heads} of {dim}, {rows} rows, norms {norms}");
        if heads > 0 {
            assert_rows(&name, &from_bf16(&got[..live * q_width]), &want, dim, 3e-3);
        }

        let (bytes, mut expected) = (on_device.read(), paged.bytes.clone());
        let (mut off, mut all) = (0, 0);
        for row in (0..live).filter(|&row| slot[row] >= 0) {
            for head in 0..kv_heads {
                let keys: Vec<f32> = turned(row, heads + head).into_iter().map(|v| v as f32).collect();
                let values = &qkv[row * width + (heads + kv_heads + head) * dim..][..dim];
                for (kind, of_values) in [(&keys[..], false), (values, true)] {
                    let stored = round(kind, fp8);
                    let (data, scale) = paged.places(slot[row] as usize, head, of_values);
                    if fp8 {
                        let found = f32::from_le_bytes(bytes[scale.clone()].try_into().unwrap());
                        assert!(
                            (found / stored.scale - 1.0).abs() < 1e-5,
                            "{name}: scale {found}, {}",
                            stored.scale
                        );
                        assert!(!of_values || found == stored.scale, "{name}: values are not rotated");
                        expected[scale.clone()].copy_from_slice(&bytes[scale]);
                    }
                    // Codes in place: a rotated value at the edge of two may fall to either, one step apart.
                    let width = if fp8 { 1 } else { 2 };
                    for (got, want) in bytes[data.clone()].chunks(width).zip(stored.bytes.chunks(width)) {
                        let number = |code: &[u8]| {
                            code.iter().rev().fold(0_i32, |sum, &byte| sum << 8 | i32::from(byte))
                        };
                        all += 1;
                        off += usize::from(got != want);
                        let apart = (number(got) - number(want)).abs();
                        let zero = number(got) & 0x7f == 0 && number(want) & 0x7f == 0;
                        assert!(apart <= i32::from(!of_values) || zero, "{name}: {got:?}, {want:?}");
                    }
                    expected[data.clone()].copy_from_slice(&bytes[data]);
                }
            }
        }
        assert!(off * 100 <= all, "{name}: {off} of {all} codes differ");
        assert!(bytes == expected, "{name}: something else in the cache was written");
    }
}

#[test]
fn kv_append_stores_zeros_as_zeros() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let shape = Shape { page_size: 16, kv_heads: 1, fp8: true, window: None, dim: HEAD_DIM };
    let paged = Paged::new(&mut random, shape, &[(0, 1)]);
    let on_device = paged.upload(&device);
    let slot = paged.slot(0, 0);
    let call = Call {
        qkv: &device.zeros(3 * HEAD_DIM).unwrap(),
        q: &device.zeros(HEAD_DIM).unwrap(),
        cache: on_device.cache,
        position: &device.upload(&[7]).unwrap(),
        slot: &device.upload(&[slot as i32]).unwrap(),
        live: &device.upload(&[1]).unwrap(),
        inv_freq: &device.upload(&frequencies(HEAD_DIM)).unwrap(),
        norms: None,
        mscale: 1.0,
        rows: 1,
        heads: 1,
    };
    KvAppend::load(&device).unwrap().issue(&device, &call).unwrap();
    let bytes = on_device.read();
    for of_values in [false, true] {
        let (data, scale) = paged.places(slot, 0, of_values);
        assert!(
            bytes[data].iter().all(|&code| code & 0x7f == 0) && bytes[scale].iter().all(|&byte| byte == 0)
        );
    }
}

#[test]
fn kv_store_puts_rotated_rows_into_the_cache() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (fp8, kv_heads, page_size, rows, dim) in [
        (true, 8, 64, 37, 64),
        (false, 8, 16, 9, 64),
        (true, 1, 16, 5, 64),
        (false, 3, 32, 2, 64),
        (true, 8, 64, 130, 128),
        (false, 3, 16, 3, 128),
        (true, 3, 256, 7, 128),
    ] {
        let shape = Shape { page_size, kv_heads, fp8, window: None, dim };
        let (live, width) = (rows - 1, 2 * kv_heads * dim);
        let paged = Paged::new(&mut random, shape, &[(0, rows + 3)]);
        let on_device = paged.upload(&device);
        let mut kv = random.units(rows * width, 4.0);
        kv[..dim].fill(0.0);
        let mut slot: Vec<i32> = (0..rows).map(|row| paged.slot(0, row + 2) as i32).collect();
        if rows > 4 {
            slot[3] = -1;
        }
        let call = StoreCall {
            kv: &device.upload(&kv).unwrap(),
            cache: on_device.cache,
            slot: &device.upload(&slot).unwrap(),
            live: &device.upload(&[live as i32]).unwrap(),
            rows,
        };
        KvAppend::load_for(&device, dim).unwrap().store(&device, &call).unwrap();
        let mut want = paged.bytes.clone();
        for row in (0..live).filter(|&row| slot[row] >= 0) {
            for head in 0..2 * kv_heads {
                let stored = round(&kv[row * width + head * dim..][..dim], fp8);
                let (data, scale) = paged.places(slot[row] as usize, head % kv_heads, head >= kv_heads);
                want[data].copy_from_slice(&stored.bytes);
                if fp8 {
                    want[scale].copy_from_slice(&stored.scale.to_le_bytes());
                }
            }
        }
        let wrong = on_device.read().iter().zip(&want).filter(|(got, want)| got != want).count();
        assert_eq!(wrong, 0, "fp8 {fp8}, {kv_heads} heads of {dim}, {rows} rows: bytes of the cache");
    }
}
