//! The modules that a configuration says were not quantised.

use std::collections::HashSet;

use serde_json::Value;

/// Most entries of a list with `*`, and most bytes of one: each is compared with each module.
const MOST_PATTERNS: usize = 512;
const LONGEST: usize = 256;

/// A list of names and patterns.
#[derive(Debug, Default)]
pub(super) struct Excluded {
    names: HashSet<String>,
    /// With `*` for any text.
    patterns: Vec<String>,
    /// Whether there are entries in a language that is not read here (`re:`): the list then excludes more than is known.
    partly_known: bool,
}

impl Excluded {
    /// Reads an array of strings.
    pub(super) fn read(key: &str, list: &Value) -> Result<Self, String> {
        let wrong = || format!("{key} is not a list of names");
        let mut excluded = Self::default();
        for entry in list.as_array().ok_or_else(wrong)? {
            let entry = entry.as_str().ok_or_else(wrong)?;
            if entry.starts_with("re:") {
                excluded.partly_known = true;
            } else if entry.contains('*') {
                if entry.len() > LONGEST || excluded.patterns.len() == MOST_PATTERNS {
                    return Err(format!(
                        "{key} has a pattern of {} bytes or more than {MOST_PATTERNS} of them",
                        entry.len()
                    ));
                }
                excluded.patterns.push(entry.to_owned());
            } else {
                excluded.names.insert(entry.to_owned());
            }
        }
        Ok(excluded)
    }

    /// Whether the list names exactly this module.
    pub(super) fn names(&self, module: &str) -> bool {
        self.names.contains(module) || self.patterns.iter().any(|pattern| matches(pattern, module))
    }

    /// Whether the list may mean this module: by name, by one of the modules it lies in, by its last part, or by an entry
    /// that is not read.
    pub(super) fn may_mean(&self, module: &str) -> bool {
        let outer = module.match_indices('.').map(|(at, _)| &module[..at]);
        let last = module.rsplit('.').next().unwrap_or(module);
        self.partly_known || outer.chain([module, last]).any(|module| self.names(module))
    }
}

/// Whether `*` of a pattern can be filled to give `text`.
fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    // The last star, and how far the text that it stands for was taken.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&byte) if byte == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match &mut star {
                Some((at, taken)) => {
                    *taken += 1;
                    (p, t) = (*at + 1, *taken);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&byte| byte == b'*')
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn stars_stand_for_any_text() {
        for (pattern, text, wanted) in [
            ("*", "", true),
            ("a*", "a", true),
            ("a*", "ba", false),
            ("*a*", "bab", true),
            ("model.layers.*.mlp*", "model.layers.10.mlp.gate_proj", true),
            ("model.layers.*.mlp*", "model.layers.10.self_attn.q_proj", false),
            ("*ab*ab", "ababab", true),
            ("*ab*abc", "ababab", false),
            ("lm_head", "lm_head", true),
        ] {
            assert_eq!(matches(pattern, text), wanted, "{pattern} {text}");
        }
        assert!(!matches(&"*a".repeat(100), &"b".repeat(10_000)));
    }

    #[test]
    fn a_list_names_modules_or_may_mean_them() {
        let list = json!(["lm_head", "model.layers.0.mlp", "*router*"]);
        let list = Excluded::read("ignore", &list).unwrap();
        assert!(list.names("lm_head") && list.names("a.router.b") && list.names("model.layers.0.mlp"));
        assert!(!list.names("model.layers.0.mlp.up_proj") && !list.names("x.lm_head"));
        assert!(list.may_mean("model.layers.0.mlp.up_proj") && list.may_mean("x.lm_head"));
        assert!(!list.may_mean("model.layers.0.self_attn.q_proj"));
        let list = Excluded::read("ignore", &json!(["re:.*mlp.*"])).unwrap();
        assert!(!list.names("anything") && list.may_mean("anything"));
    }

    #[test]
    fn what_is_no_list_of_names_is_refused() {
        let long = "*".repeat(LONGEST + 1);
        let many: Vec<String> = (0..=MOST_PATTERNS).map(|i| format!("{i}*")).collect();
        for list in [json!("lm_head"), json!([1]), json!({}), json!([long]), json!(many)] {
            assert!(Excluded::read("ignore", &list).is_err());
        }
    }
}
