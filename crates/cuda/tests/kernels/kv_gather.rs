use ctxserve_cuda::ops::attention::Sequences;
use ctxserve_cuda::ops::kv_gather::{Call, KvGather, lines_of};
use half::bf16;

use crate::attention::{Paged, Shape};
use crate::common::{Random, device};

#[test]
fn kv_gather_copies_what_is_visible() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (fp8, window, page_size, kv_heads, dim) in [
        (true, None, 16, 2, 64),
        (false, Some(128), 16, 2, 64),
        (false, None, 64, 8, 64),
        (true, Some(20), 64, 1, 64),
        (true, None, 64, 2, 128),
        (false, None, 16, 3, 128),
    ] {
        let shape = Shape { page_size, kv_heads, fp8, window, dim };
        // Position of the first row, and rows. The first two sequences and the last are not asked for.
        let parts = [(5, 1), (70, 1), (0, 1), (0, 128), (129, 130), (1000, 3), (127, 129), (0, 300), (3, 3)];
        let (first, count) = (2, parts.len() - 3);
        let seen = |start: usize| window.map_or(0, |window| (start + 1).saturating_sub(window));
        let sequences: Vec<_> = parts.iter().map(|&(start, rows)| (seen(start), start + rows)).collect();
        let mut paged = Paged::new(&mut random, shape, &sequences);
        for (sequence, &(first, len)) in sequences.iter().enumerate() {
            paged.fill(&mut random, sequence, first..len);
        }
        let on_device = paged.upload(&device);
        let asked = &parts[first..first + count];
        let needed: usize = asked.iter().map(|&(start, rows)| lines_of(start, rows, window)).sum();
        let lines = needed + 256;
        let mut scratch = [(); 2].map(|()| device.allocate::<u16>(kv_heads * lines * dim).unwrap());
        scratch.iter_mut().for_each(|scratch| scratch.fill(0xff).unwrap());
        let ints = |values: &mut dyn Iterator<Item = usize>| {
            device.upload(&values.map(|v| v as i32).collect::<Vec<_>>()).unwrap()
        };
        let call = Call {
            cache: on_device.cache,
            tables: on_device.tables(),
            sequences: Sequences {
                first,
                count,
                first_row: &ints(&mut parts.iter().map(|_| 0)),
                row_count: &ints(&mut parts.iter().map(|part| part.1)),
                start: &ints(&mut parts.iter().map(|part| part.0)),
            },
            keys: &scratch[0],
            values: &scratch[1],
            lines,
        };
        KvGather::load_for(&device, dim).unwrap().issue(&device, &call).unwrap();
        for (kind, scratch) in scratch.iter().enumerate() {
            let bits = scratch.read(0, scratch.len()).unwrap();
            let at = |head: usize, line: usize, d: usize| {
                bits[((head * (dim / 64) + d / 64) * lines + line) * 64
                    + ((d % 64 / 8) ^ (line % 8)) * 8
                    + d % 8]
            };
            for head in 0..kv_heads {
                let mut line = 0;
                for (sequence, &(start, rows)) in (first..).zip(asked) {
                    let end = line + lines_of(start, rows, window);
                    for position in seen(start)..start + rows {
                        for d in 0..dim {
                            let want = bf16::from_f32(paged.tokens[sequence][position][head][kind][d] as f32);
                            assert_eq!(
                                at(head, line, d),
                                want.to_bits(),
                                "{shape:?} {sequence} {position} {d}"
                            );
                        }
                        line += 1;
                    }
                    assert!((line..end).all(|line| (0..dim).all(|d| at(head, line, d) == 0)), "padding");
                    line = end;
                }
                assert!((line..lines).all(|line| (0..dim).all(|d| at(head, line, d) == 0xffff)));
            }
        }
    }
}
