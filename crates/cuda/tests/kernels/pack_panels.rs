use ctxserve_cuda::ops::pack_panels::{Call, PackPanels, Source};
use half::bf16;

use crate::common::{Random, device, panel, to_bf16};
use crate::gemv::poisoned;

#[test]
fn pack_panels_puts_every_element_in_its_place() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (rows, cols, first, count, capacity, padded, mapped, single) in [
        (8, 64, 0, 8, 8, 64, false, false),
        (5, 60, 0, 16, 16, 64, false, true),
        (40, 130, 8, 48, 72, 192, true, false),
        (33, 100, 3, 50, 56, 128, true, true),
        (2880, 513, 0, 2880, 2880, 576, true, false),
    ] {
        let values = random.units(rows * cols, 4.0);
        let bits = to_bf16(&values);
        let row_map: Vec<i32> = (0..count).map(|_| random.below(rows + 1) as i32 - 1).collect();
        let column_map: Vec<i32> = (0..padded).map(|_| random.below(cols + 1) as i32 - 1).collect();
        let panels = poisoned::<u16>(&device, capacity * padded);
        let (rows_on, columns_on) = (device.upload(&row_map).unwrap(), device.upload(&column_map).unwrap());
        let (wide, narrow) = (device.upload(&values).unwrap(), device.upload(&bits).unwrap());
        let call = Call {
            source: if single { Source::F32(&wide) } else { Source::Bf16(&narrow) },
            rows,
            cols,
            panels: &panels,
            capacity,
            padded,
            first,
            count,
            row_map: Some(&rows_on).filter(|_| mapped),
            column_map: Some(&columns_on).filter(|_| mapped),
        };
        PackPanels::load(&device).unwrap().issue(&device, &call).unwrap();
        let panels = panels.read(0, panels.len()).unwrap();
        for row in 0..capacity {
            for col in 0..padded {
                let got = panels[panel(row, col, capacity)];
                if !(first..first + count).contains(&row) {
                    assert_eq!(got, 0xffff, "row {row} is not to be written");
                    continue;
                }
                let at = |map: &[i32], at: usize, end: usize| {
                    let from = if mapped { map[at] } else { at as i32 };
                    usize::try_from(from).ok().filter(|&from| from < end)
                };
                let want = match (at(&row_map, row - first, rows), at(&column_map, col, cols)) {
                    (Some(row), Some(col)) => bf16::from_f32(values[row * cols + col]).to_bits(),
                    _ => 0,
                };
                assert_eq!(got, want, "({row}, {col}) of [{capacity}, {padded}]");
            }
        }
        assert!(panels[capacity * padded..].iter().all(|&v| v == 0xffff), "beyond the matrix");
    }
}
