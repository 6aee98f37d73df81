//! vLLM's spelling rules, applied before clap sees the arguments: `_` is `-`, short spellings such as `-tp`,
//! negated switches, and flags of other servers answered with our name for them.

use super::table::{ALIASES, FOREIGN, Takes, find, flags};

/// Rewrites arguments to the spellings of the table.
///
/// # Errors
/// A message for flags that belong to another server, or that spell a JSON value with dots.
pub(super) fn normalise(args: impl IntoIterator<Item = String>) -> Result<Vec<String>, String> {
    let mut out = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        if arg == "--" {
            out.push(arg);
            out.extend(args);
            break;
        }
        out.push(flag(&arg)?.unwrap_or(arg));
    }
    Ok(out)
}

/// The canonical spelling of one argument; `None` when it is no long flag or already canonical.
fn flag(arg: &str) -> Result<Option<String>, String> {
    let (raw, value) = match arg.split_once('=') {
        Some((raw, value)) => (raw, Some(value)),
        None => (arg, None),
    };
    let aliased = ALIASES.iter().find(|(from, _)| *from == raw.replace('_', "-")).map(|&(_, to)| to);
    let Some(name) = aliased.unwrap_or(raw).strip_prefix("--") else { return Ok(None) };
    let name = name.replace('_', "-");
    if find(&name).is_some() {
        return Ok(Some(join(&name, value)));
    }
    if let Some(positive) = negated(&name) {
        return match value {
            None | Some("true") => Ok(Some(format!("--{positive}=false"))),
            Some("false") => Ok(Some(format!("--{positive}=true"))),
            Some(other) => Err(format!("--{name} takes no value, or true or false; got {other:?}")),
        };
    }
    if let Some((from, server, to)) = FOREIGN.iter().find(|(from, _, _)| *from == name) {
        return Err(format!("--{from} is a flag of {server}; here it is --{to}"));
    }
    if let Some((base, key)) = name.split_once('.')
        && find(base).is_some()
    {
        return Err(format!("--{base}.{key}: give --{base} one JSON value instead of dotted keys"));
    }
    Ok(Some(join(&name, value)))
}

fn join(name: &str, value: Option<&str>) -> String {
    match value {
        Some(value) => format!("--{name}={value}"),
        None => format!("--{name}"),
    }
}

/// The switch that `name` negates: `no-X`, and for `enable-X` also `disable-X` and `no-enable-X`.
fn negated(name: &str) -> Option<&'static str> {
    let switch = |flag: &&super::table::Flag| flag.takes == Takes::Switch;
    flags()
        .filter(switch)
        .find(|flag| {
            name.strip_prefix("no-") == Some(flag.name)
                || flag
                    .name
                    .strip_prefix("enable-")
                    .is_some_and(|rest| name.strip_prefix("disable-") == Some(rest))
        })
        .map(|flag| flag.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(arg: &str) -> Result<Vec<String>, String> {
        normalise([arg.to_owned()])
    }

    #[test]
    fn underscores_and_dashes_are_the_same_in_names_only() {
        assert_eq!(one("--max_model_len=a_b").unwrap(), ["--max-model-len=a_b"]);
        assert_eq!(one("my_model").unwrap(), ["my_model"]);
    }

    #[test]
    fn negations_become_false() {
        assert_eq!(one("--no-trust-remote-code").unwrap(), ["--trust-remote-code=false"]);
        assert_eq!(one("--disable-chunked-prefill").unwrap(), ["--enable-chunked-prefill=false"]);
        assert_eq!(one("--no_enable_chunked_prefill").unwrap(), ["--enable-chunked-prefill=false"]);
        assert!(one("--no-trust-remote-code=maybe").is_err());
        assert_eq!(one("--disable-log-stats").unwrap(), ["--disable-log-stats"]);
    }

    #[test]
    fn short_spellings_and_aliases() {
        assert_eq!(one("-tp").unwrap(), ["--tensor-parallel-size"]);
        assert_eq!(one("-tp=2").unwrap(), ["--tensor-parallel-size=2"]);
        assert_eq!(one("-1").unwrap(), ["-1"]);
    }

    #[test]
    fn flags_of_other_servers_are_named() {
        let error = one("--context_length").unwrap_err();
        assert!(error.contains("SGLang") && error.contains("--max-model-len"), "{error}");
        assert!(one("--kv-events-config.topic").unwrap_err().contains("one JSON value"));
    }

    #[test]
    fn nothing_after_two_dashes_changes() {
        let args = ["--", "--max_model_len"].map(str::to_owned);
        assert_eq!(normalise(args.clone()).unwrap(), args);
    }
}
