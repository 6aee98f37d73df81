//! Reading an untrusted JSON object: every value is checked for kind and range, and every error names its field.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::ConfigError;

/// An object of the configuration, with its path for error messages. `null` reads as absent.
#[derive(Clone, Debug)]
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: String,
}

impl<'a> Fields<'a> {
    /// The whole configuration.
    pub(crate) fn root(config: &'a Value) -> Result<Self, ConfigError> {
        let map = config.as_object().ok_or_else(|| ConfigError::new("config", "is not a JSON object"))?;
        Ok(Self { map, path: String::new() })
    }

    /// A nested object.
    pub(crate) fn object(&self, name: &str) -> Result<Option<Fields<'a>>, ConfigError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let map = value.as_object().ok_or_else(|| self.error(name, "is not an object"))?;
        Ok(Some(Fields { map, path: format!("{}{name}.", self.path) }))
    }

    /// A value that is there and not `null`.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Whether the field is there and `null`, which some files mean differently from absent.
    pub(crate) fn is_null(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(Value::is_null)
    }

    /// An error about a field of this object.
    pub(crate) fn error(&self, name: &str, what: impl Into<String>) -> ConfigError {
        ConfigError::new(format!("{}{name}", self.path), what)
    }

    /// A whole number.
    pub(crate) fn int(&self, name: &str, range: RangeInclusive<usize>) -> Result<Option<usize>, ConfigError> {
        self.value(name, "an integer", range, |value| value.as_u64().and_then(|n| n.try_into().ok()))
    }

    /// A whole number that must be there.
    pub(crate) fn need_int(&self, name: &str, range: RangeInclusive<usize>) -> Result<usize, ConfigError> {
        self.int(name, range)?.ok_or_else(|| self.error(name, "is missing"))
    }

    /// A whole number known under two names, which must agree where both are there; errors use the first name.
    pub(crate) fn need_int_alias(
        &self,
        [name, alias]: [&str; 2],
        range: RangeInclusive<usize>,
    ) -> Result<usize, ConfigError> {
        let values = (self.int(name, range.clone())?, self.int(alias, range)?);
        match values {
            (Some(a), Some(b)) if a != b => Err(self.error(name, format!("is {a} while {alias} is {b}"))),
            (Some(n), _) | (None, Some(n)) => Ok(n),
            (None, None) => Err(self.error(name, format!("is missing, and so is {alias}"))),
        }
    }

    /// A finite number.
    pub(crate) fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ConfigError> {
        self.value(name, "a number", range, Value::as_f64)
    }

    /// A truth value.
    pub(crate) fn flag(&self, name: &str) -> Result<Option<bool>, ConfigError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.error(name, "must be true or false"))
    }

    /// A string.
    pub(crate) fn text(&self, name: &str) -> Result<Option<&'a str>, ConfigError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.error(name, "must be a string"))
    }

    fn value<T: PartialOrd + Display>(
        &self,
        name: &str,
        kind: &str,
        range: RangeInclusive<T>,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match read(value) {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => {
                let (low, high) = range.into_inner();
                // The file may hold anything here, of any length.
                let found: String = value.to_string().chars().take(80).collect();
                Err(self.error(name, format!("must be {kind} between {low} and {high}, got {found}")))
            }
        }
    }
}
