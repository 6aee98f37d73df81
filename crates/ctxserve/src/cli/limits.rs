//! Flags that set the server's limits: one a row of its table.

use ctxserve_server::limits::{Amount, Limit, Limits, TABLE, Unit};

use super::numbers::bytes;
use super::options::seconds;
use super::table::{Flag, Takes, honoured};
use super::values::{OptionError, Values};

const fn flag(limit: &Limit) -> Flag {
    let takes = match limit.unit {
        Unit::Count => Takes::Value("N"),
        Unit::Bytes => Takes::Value("BYTES"),
        Unit::Seconds => Takes::Value("SECONDS"),
    };
    honoured(limit.flag, takes, limit.help)
}

/// The flags.
pub(super) static FLAGS: [Flag; TABLE.len()] = {
    let mut flags = [flag(&TABLE[0]); TABLE.len()];
    let mut at = 1;
    while at < TABLE.len() {
        flags[at] = flag(&TABLE[at]);
        at += 1;
    }
    flags
};

/// Reads every limit that was given.
///
/// # Errors
/// A value that is none, or outside the limit's range.
pub(super) fn limits(values: &Values) -> Result<Limits, OptionError> {
    let mut limits = Limits::default();
    for limit in &TABLE {
        if let Some(amount) = values.read(limit.flag, |text| amount(limit, text))? {
            limits.set(limit, amount);
        }
    }
    Ok(limits)
}

fn amount(limit: &Limit, text: &str) -> Result<Amount, String> {
    let (amount, fits) = match limit.unit {
        Unit::Count => {
            let number = text.parse().map_err(|_| format!("expected a number, got {text:?}"))?;
            (Amount::Number(number), (limit.least..=limit.most).contains(&number))
        }
        Unit::Bytes => {
            let number = bytes(text)?;
            (Amount::Number(number), (limit.least..=limit.most).contains(&number))
        }
        Unit::Seconds => {
            let time = seconds(text)?;
            let range = limit.least as f64..=limit.most as f64;
            (Amount::Time(time), range.contains(&time.as_secs_f64()))
        }
    };
    if fits { Ok(amount) } else { Err(format!("expected {} to {}, got {text}", limit.least, limit.most)) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::values::{Origin, from_toml};
    use super::*;

    fn read(text: &str) -> Result<Limits, String> {
        limits(&from_toml(text, &Origin::Flag).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn each_limit_has_a_flag() {
        let given = "max-n = 7\nmax-body-bytes = '2MiB'\nbody_timeout = 1.5\nmax-logprobs = 0";
        let found = read(given).unwrap();
        assert_eq!((found.max_n, found.max_body_bytes, found.max_logprobs), (7, 2 << 20, 0));
        assert_eq!(found.body_timeout, Duration::from_millis(1500));
        assert_eq!(read("").unwrap(), Limits::default());
    }

    /// The table in docs/limits.md, as this program has it.
    fn documented() -> String {
        let amount = |limit: &Limit, number: usize| match limit.unit {
            Unit::Bytes if number.is_multiple_of(1 << 20) => format!("{} MiB", number >> 20),
            Unit::Bytes if number.is_multiple_of(1 << 10) => format!("{} KiB", number >> 10),
            Unit::Bytes => format!("{number} B"),
            Unit::Seconds => format!("{number} s"),
            Unit::Count => number.to_string(),
        };
        let row = |limit: &Limit| {
            let [default, least, most] = [limit.default, limit.least, limit.most].map(|n| amount(limit, n));
            format!("| `--{}` | {default} | {least} to {most} | {} |\n", limit.flag, limit.help)
        };
        let head = "| flag | default | may be set to | what it bounds |\n|---|---|---|---|\n";
        std::iter::once(head.to_owned()).chain(TABLE.iter().map(row)).collect()
    }

    /// security: ceilings to publish. The documentation lists every limit as it is; `BLESS=1` writes it anew.
    #[test]
    fn the_documentation_lists_every_limit() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/limits.md");
        let text = std::fs::read_to_string(path).unwrap();
        let (before, rest) = text.split_once("<!-- table -->\n").unwrap();
        let (_, after) = rest.split_once("<!-- end -->").unwrap();
        let wanted = format!("{before}<!-- table -->\n{}<!-- end -->{after}", documented());
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(path, wanted).unwrap();
        } else {
            assert_eq!(text, wanted, "docs/limits.md is old; BLESS=1 cargo test writes it");
        }
    }

    #[test]
    fn values_outside_the_range_are_refused_with_it() {
        for (text, flag, range) in [
            ("max-n = 0", "--max-n", "1 to 1024"),
            ("max-n = 1025", "--max-n", "1 to 1024"),
            ("max-logprobs = 21", "--max-logprobs", "0 to 20"),
            ("max-logprobs = -1", "--max-logprobs", "number"),
            ("max-header-bytes = 100", "--max-header-bytes", "8192 to"),
            ("header-timeout = 0.5", "--header-timeout", "1 to 3600"),
            ("max-json-depth = 1000", "--max-json-depth", "16 to 120"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(flag) && error.contains(range), "{error}");
        }
    }
}
