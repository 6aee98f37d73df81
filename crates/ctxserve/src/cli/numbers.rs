//! Numbers as people write them on command lines.

/// `64000`, `64k` (x1000), `64K` (x1024); at least 1.
pub(super) fn tokens(text: &str) -> Result<usize, String> {
    scaled(text, &[("k", 1000), ("K", 1024), ("m", 1_000_000), ("M", 1 << 20)])
        .filter(|&number| number > 0)
        .ok_or_else(|| format!("expected a positive number such as 64000, 64k or 64K, got {text:?}"))
}

/// A plain number of at least 1.
pub(super) fn count(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|&number| number > 0)
        .ok_or_else(|| format!("expected a positive number, got {text:?}"))
}

/// `2147483648`, `2G` or `2GB` (x1000^3), `2GiB` (x1024^3).
pub(super) fn bytes(text: &str) -> Result<usize, String> {
    let units = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("KB", 1000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("k", 1000),
        ("K", 1000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
        ("B", 1),
    ];
    scaled(text, &units)
        .filter(|&number| number > 0)
        .ok_or_else(|| format!("expected bytes such as 2147483648, 2GB or 2GiB, got {text:?}"))
}

/// A number and the first unit that it ends with.
fn scaled(text: &str, units: &[(&str, u64)]) -> Option<usize> {
    let text = text.trim();
    let (number, unit) =
        units.iter().find_map(|&(unit, size)| Some((text.strip_suffix(unit)?, size))).unwrap_or((text, 1));
    let number = number.trim();
    if let Ok(whole) = number.parse::<u64>() {
        return usize::try_from(whole.checked_mul(unit)?).ok();
    }
    let fraction: f64 = number.parse().ok()?;
    let product = fraction * unit as f64;
    (unit > 1 && product.is_finite() && (0.0..9.0e15).contains(&product)).then_some(product as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(tokens("1k"), Ok(1000));
        assert_eq!(tokens("1K"), Ok(1024));
        assert_eq!(tokens("1.5k"), Ok(1500));
        assert_eq!(bytes("2GiB"), Ok(2 << 30));
        assert_eq!(bytes("2G"), Ok(2_000_000_000));
        assert_eq!(bytes("512 MiB"), Ok(512 << 20));
        assert_eq!(count("12"), Ok(12));
    }

    #[test]
    fn nonsense() {
        for text in ["", "k", "-5", "1.5", "1e400k", "99999999999999999999", "99999999999999T", "NaNk", "0"] {
            assert!(tokens(text).is_err() && bytes(text).is_err(), "{text}");
        }
        assert!(count("1k").is_err() && count("0").is_err());
    }
}
