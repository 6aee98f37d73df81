//! What was given for each flag, and by whom: the command line, a file, or a profile.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::table::{self, Flag, Takes, Treatment};

/// Who gave a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The command line.
    Flag,
    /// A `--config` file.
    File(PathBuf),
    /// A profile of `configs/`.
    Profile(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => write!(f, "command line"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Profile(name) => write!(f, "profile {name}"),
        }
    }
}

/// A mistake in what was given.
#[derive(Debug, Error)]
pub enum OptionError {
    /// A value that a flag cannot take.
    #[error("--{name} ({origin}): {what}")]
    Value {
        /// The flag.
        name: &'static str,
        /// Who gave it.
        origin: Origin,
        /// What is wrong with it.
        what: String,
    },
    /// A flag that this server refuses.
    #[error("--{name} ({origin}) is refused: {why}")]
    Refused {
        /// The flag.
        name: &'static str,
        /// Who gave it.
        origin: Origin,
        /// Why.
        why: String,
    },
    /// A key of a file that is no flag.
    #[error("{origin}: unknown key {key:?}{hint}")]
    UnknownKey {
        /// The file.
        origin: Origin,
        /// The key.
        key: String,
        /// What may have been meant.
        hint: String,
    },
    /// A file that is not TOML.
    #[error("{origin}: {what}")]
    File {
        /// The file.
        origin: Origin,
        /// What is wrong.
        what: String,
    },
}

/// What was given for one flag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    /// One entry, or several for lists.
    pub values: Vec<String>,
    /// Who gave it.
    pub origin: Origin,
}

/// Everything given, by flag name.
#[derive(Clone, Debug, Default)]
pub struct Values(BTreeMap<&'static str, Given>);

impl Values {
    /// Adds a value, unless a stronger origin has given one already.
    pub fn offer(&mut self, flag: &'static Flag, given: Given) {
        self.0.entry(flag.name).or_insert(given);
    }

    /// Adds everything that nobody has given yet.
    pub fn offer_all(&mut self, weaker: Self) {
        for (name, given) in weaker.0 {
            self.0.entry(name).or_insert(given);
        }
    }

    /// What was given for a flag.
    pub fn get(&self, name: &str) -> Option<&Given> {
        self.0.get(name)
    }

    /// The value of a flag that takes one.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.get(name)?.values.last().map(String::as_str)
    }

    /// All values of a list.
    pub fn list(&self, name: &str) -> Vec<String> {
        self.get(name).map(|given| given.values.clone()).unwrap_or_default()
    }

    /// Reads one value with `read`, whose error says what is wrong.
    ///
    /// # Errors
    /// `read`'s, with the flag's name and origin.
    pub fn read<T>(
        &self,
        name: &str,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, OptionError> {
        let Some((&name, given)) = self.0.get_key_value(name) else { return Ok(None) };
        let Some(text) = given.values.last() else { return Ok(None) };
        let wrong = |what| OptionError::Value { name, origin: given.origin.clone(), what };
        read(text).map(Some).map_err(wrong)
    }

    /// A switch.
    ///
    /// # Errors
    /// A value other than true or false.
    pub fn switch(&self, name: &str) -> Result<Option<bool>, OptionError> {
        self.read(name, |text| text.parse().map_err(|_| format!("expected true or false, got {text:?}")))
    }

    /// Applies the table: refuses what is refused, and says what has no effect.
    ///
    /// # Errors
    /// The first flag that is refused.
    pub fn check(&self) -> Result<Vec<String>, OptionError> {
        let mut notes = Vec::new();
        for (name, given) in &self.0 {
            let Some(flag) = table::find(name) else { continue };
            let refuse = |why: String| {
                Err(OptionError::Refused { name: flag.name, origin: given.origin.clone(), why })
            };
            let off = flag.takes == Takes::Switch && self.switch(name)? == Some(false);
            match flag.treatment {
                Treatment::Honoured => {}
                Treatment::NoOp(why) => notes.push(format!("--{name} has no effect: {why}")),
                Treatment::Refused(_) if off => {}
                Treatment::Refused(why) => return refuse(why.to_owned()),
                Treatment::Only(allowed, why) => {
                    if let Some(value) = given.values.iter().find(|value| !allowed.contains(&value.as_str()))
                    {
                        return refuse(format!("{value:?} is not possible: {why}"));
                    }
                }
            }
        }
        Ok(notes)
    }
}

/// Reads a TOML file whose keys are flag names.
///
/// # Errors
/// A file that cannot be read or is not TOML, an unknown key, a value of the wrong type.
pub fn from_file(path: &Path) -> Result<Values, OptionError> {
    let origin = Origin::File(path.to_owned());
    let text = std::fs::read_to_string(path)
        .map_err(|error| OptionError::File { origin: origin.clone(), what: error.to_string() })?;
    from_toml(&text, &origin)
}

/// Reads TOML whose keys are flag names, `_` and `-` being the same.
///
/// # Errors
/// As [`from_file`].
pub fn from_toml(text: &str, origin: &Origin) -> Result<Values, OptionError> {
    let table: toml::Table = toml::from_str(text)
        .map_err(|error| OptionError::File { origin: origin.clone(), what: error.to_string() })?;
    let mut values = Values::default();
    for (key, value) in table {
        let name = key.replace('_', "-");
        let Some(flag) = table::find(&name).filter(|flag| flag.name != "config") else {
            let hint = table::FOREIGN
                .iter()
                .find(|(from, _, _)| *from == name)
                .map(|(_, server, to)| format!("; it is {server}'s, here it is {to:?}"))
                .unwrap_or_default();
            return Err(OptionError::UnknownKey { origin: origin.clone(), key, hint });
        };
        let wrong = |expected: &str| OptionError::Value {
            name: flag.name,
            origin: origin.clone(),
            what: format!("expected {expected}, got {value}"),
        };
        let values_of = match (flag.takes, &value) {
            (Takes::Switch, toml::Value::Boolean(on)) => vec![on.to_string()],
            (Takes::Switch, _) => return Err(wrong("true or false")),
            (Takes::List(_), toml::Value::Array(items)) => items
                .iter()
                .map(scalar)
                .collect::<Option<_>>()
                .ok_or_else(|| wrong("a list of plain values"))?,
            (Takes::Value(_), toml::Value::Table(_) | toml::Value::Array(_)) => {
                vec![serde_json::to_string(&value).map_err(|_| wrong("a value"))?]
            }
            (Takes::Value(_) | Takes::List(_), _) => {
                vec![scalar(&value).ok_or_else(|| wrong("a plain value"))?]
            }
        };
        values.offer(flag, Given { values: values_of, origin: origin.clone() });
    }
    Ok(values)
}

fn scalar(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(on) => Some(on.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin() -> Origin {
        Origin::File("serve.toml".into())
    }

    #[test]
    fn toml_keys_are_flag_names_in_either_spelling() {
        let values = from_toml(
            "max_model_len = 4096\nserved-model-name = ['a', 'b']\nenable-auto-tool-choice = true\n\
             [override-generation-config]\ntemperature = 0.5\n",
            &origin(),
        )
        .unwrap();
        assert_eq!(values.text("max-model-len"), Some("4096"));
        assert_eq!(values.list("served-model-name"), ["a", "b"]);
        assert_eq!(values.switch("enable-auto-tool-choice").unwrap(), Some(true));
        assert_eq!(values.text("override-generation-config"), Some("{\"temperature\":0.5}"));
    }

    #[test]
    fn unknown_keys_and_wrong_types_are_errors_that_name_them() {
        let error = from_toml("max-modle-len = 1", &origin()).unwrap_err().to_string();
        assert!(error.contains("serve.toml") && error.contains("max-modle-len"), "{error}");
        let error = from_toml("context-length = 1", &origin()).unwrap_err().to_string();
        assert!(error.contains("max-model-len"), "{error}");
        let error = from_toml("trust-remote-code = 'yes'", &origin()).unwrap_err().to_string();
        assert!(error.contains("trust-remote-code") && error.contains("true or false"), "{error}");
        assert!(from_toml("port = ", &origin()).is_err());
    }

    #[test]
    fn the_first_offer_wins() {
        let mut values = from_toml("port = 1", &Origin::Flag).unwrap();
        values.offer_all(from_toml("port = 2\nhost = 'x'", &origin()).unwrap());
        assert_eq!((values.text("port"), values.text("host")), (Some("1"), Some("x")));
    }

    #[test]
    fn the_table_is_applied() {
        let check = |text| from_toml(text, &origin()).unwrap().check();
        assert!(check("port = 1").unwrap().is_empty());
        assert_eq!(check("trust-remote-code = true").unwrap().len(), 1);
        assert!(check("tensor-parallel-size = 1").unwrap().is_empty());
        let error = check("tensor-parallel-size = 2").unwrap_err().to_string();
        assert!(error.contains("--tensor-parallel-size") && error.contains("one device"), "{error}");
        assert!(check("enable-lora = false").unwrap().is_empty());
        assert!(check("enable-lora = true").is_err());
    }
}
