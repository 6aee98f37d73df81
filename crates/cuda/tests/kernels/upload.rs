use ctxserve_cuda::driver::Uploader;

use crate::common::{Random, device};
use crate::gemv::poisoned;

/// Elements of 8 bytes that one thread copies at a time.
const PIECE: usize = (4 << 20) / 8;

#[test]
fn upload_copies_every_byte_and_no_other() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let mut uploader = Uploader::new(&device).unwrap();
    let mut counts = vec![0, 1, 2, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE + 5, 40 * PIECE + 77];
    counts.extend((0..24).map(|_| random.below(6 * PIECE)));
    // All are issued before any is looked at, so that staging memory is used again while copies are under way.
    let copies: Vec<_> = counts
        .into_iter()
        .map(|count| {
            let (start, at) = (random.bits() >> 1, random.below(9));
            let mut values: Vec<u64> = (0..count as u64).map(|i| start.wrapping_add(i) >> 1).collect();
            let mut to = poisoned::<u64>(&device, count + 16);
            uploader.write(&mut to, at, &values).unwrap();
            // They are the caller's again.
            values.fill(0);
            (start, at, count, to)
        })
        .collect();
    drop(uploader);
    for (start, at, count, to) in copies {
        let got = to.read(0, to.len()).unwrap();
        let wanted = (0..count as u64).map(|i| start.wrapping_add(i) >> 1);
        assert!(got[at..][..count].iter().copied().eq(wanted), "{count} elements at {at}");
        let outside = got[..at].iter().chain(&got[at + count..]);
        assert!(outside.copied().all(|value| value == u64::MAX), "{count} elements at {at}");
    }
}

#[test]
fn upload_refuses_what_does_not_fit() {
    let Some((device, _turn)) = device() else { return };
    let mut uploader = Uploader::new(&device).unwrap();
    let mut to = device.allocate::<u64>(10).unwrap();
    for (at, count) in [(0, 11), (10, 1), (11, 0), (usize::MAX, 1)] {
        assert!(uploader.write(&mut to, at, &vec![0; count]).is_err(), "{count} elements at {at}");
    }
    uploader.write(&mut to, 10, &[]).unwrap();
}
