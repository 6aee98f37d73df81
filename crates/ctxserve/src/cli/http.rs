//! Flags of the socket: where to listen, who may come in, and how much they may ask for.

use std::path::Path;
use std::time::Duration;

use ctxserve_server::limits::Limits;
use ctxserve_server::{ApiKeys, Browsers, ReasoningNames};

use super::limits::limits;
use super::options::{one_of, seconds};
use super::values::{OptionError, Values};

/// Largest file of keys, bytes.
const KEY_FILE_BYTES: u64 = 1 << 20;

/// The socket and who may use it.
#[derive(Clone, Debug)]
pub struct HttpOptions {
    /// Address or name.
    pub host: String,
    /// Port; 0 is any.
    pub port: u16,
    /// Keys; none is open.
    pub api_keys: ApiKeys,
    /// Whether `/metrics` needs none.
    pub metrics_without_key: bool,
    /// What web pages may do.
    pub browsers: Browsers,
    /// How long a shutdown waits.
    pub drain: Duration,
    /// Whether tools may be offered with `tool_choice: "auto"`.
    pub auto_tools: bool,
    /// By which names chat answers show reasoning.
    pub reasoning_names: ReasoningNames,
    /// Ceilings on what clients may send.
    pub limits: Limits,
}

impl HttpOptions {
    pub(super) fn new(values: &Values, env: impl Fn(&str) -> Option<String>) -> Result<Self, OptionError> {
        let host = values.text("host").unwrap_or("0.0.0.0").to_owned();
        let names = [
            ("both", ReasoningNames::Both),
            ("reasoning", ReasoningNames::Reasoning),
            ("reasoning_content", ReasoningNames::ReasoningContent),
        ];
        Ok(Self {
            port: values.read("port", port)?.unwrap_or(8000),
            api_keys: keys(values, env)?,
            metrics_without_key: values.switch("metrics-without-key")?.unwrap_or(false),
            browsers: browsers(values, &host)?,
            drain: values.read("shutdown-timeout", seconds)?.unwrap_or(Duration::from_secs(30)),
            auto_tools: values.switch("enable-auto-tool-choice")?.unwrap_or(true),
            reasoning_names: values.read("reasoning-field", |text| one_of(text, &names))?.unwrap_or_default(),
            limits: limits(values)?,
            host,
        })
    }
}

/// Keys of the command line and of the file together; the environment's where there are none.
fn keys(values: &Values, env: impl Fn(&str) -> Option<String>) -> Result<ApiKeys, OptionError> {
    let mut keys = values.list("api-key");
    // An empty key would let everybody in who sends an empty header.
    let empty = keys.iter().any(|key| key.trim().is_empty());
    values.read("api-key", |_| if empty { Err("a key must not be empty".to_owned()) } else { Ok(()) })?;
    keys.extend(values.read("api-key-file", |path| key_file(Path::new(path)))?.unwrap_or_default());
    if keys.is_empty() {
        let named = ["CTXSERVE_API_KEY", "VLLM_API_KEY"].into_iter().find_map(env);
        keys.extend(named.filter(|key| !key.trim().is_empty()));
    }
    Ok(ApiKeys::new(keys))
}

/// One key a line; empty lines and those that begin with `#` are none.
fn key_file(path: &Path) -> Result<Vec<String>, String> {
    let shown = path.display();
    let fail = |what: &dyn std::fmt::Display| format!("{shown}: {what}");
    let length = std::fs::metadata(path).map_err(|error| fail(&error))?.len();
    if length > KEY_FILE_BYTES {
        return Err(fail(&format!("{length} bytes, at most {KEY_FILE_BYTES} are read")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| fail(&error))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let keys: Vec<String> = lines.map(str::to_owned).collect();
    // A file without keys would open what it was meant to close.
    if keys.is_empty() { Err(fail(&"there is no key in it")) } else { Ok(keys) }
}

fn browsers(values: &Values, host: &str) -> Result<Browsers, OptionError> {
    let list = |name| {
        values.read(name, |text| {
            serde_json::from_str::<Vec<String>>(text).map_err(|_| {
                format!("expected a JSON list of strings such as [\"https://app.example.com\"], got {text}")
            })
        })
    };
    let browsers = Browsers {
        hosts: values.list("allowed-hosts"),
        own_name: Some(host.trim_matches(['[', ']']).to_owned()),
        origins: list("allowed-origins")?.unwrap_or_default(),
        methods: list("allowed-methods")?,
        headers: list("allowed-headers")?,
        credentials: values.switch("allow-credentials")?.unwrap_or(false),
    };
    if let Err(error) = browsers.check() {
        values.read(error.flag(), |_| Err::<(), _>(error.to_string()))?;
    }
    Ok(browsers)
}

fn port(text: &str) -> Result<u16, String> {
    text.parse().map_err(|_| format!("expected a port from 0 to 65535, got {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::super::values::{Origin, from_toml};
    use super::*;

    fn read(toml: &str) -> Result<HttpOptions, String> {
        let values = from_toml(toml, &Origin::Flag).unwrap();
        HttpOptions::new(&values, |_| None).map_err(|error| error.to_string())
    }

    #[test]
    fn keys_come_from_flags_and_files_or_else_from_the_environment() {
        let env = |name: &str| (name == "VLLM_API_KEY").then(|| "from-env".to_owned());
        let keys = |toml: &str| {
            let values = from_toml(toml, &Origin::Flag).unwrap();
            HttpOptions::new(&values, env).map(|http| http.api_keys).map_err(|error| error.to_string())
        };
        assert_eq!(keys("").unwrap(), ApiKeys::new(["from-env"]));
        assert_eq!(keys("api-key = ['a', 'b']").unwrap(), ApiKeys::new(["a", "b"]));
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().display();
        std::fs::write(file.path(), "# ours\n\n c \r\nd\n").unwrap();
        assert_eq!(keys(&format!("api-key-file = '{path}'")).unwrap(), ApiKeys::new(["c", "d"]));
        let both = format!("api-key = ['a']\napi-key-file = '{path}'");
        assert_eq!(keys(&both).unwrap(), ApiKeys::new(["a", "c", "d"]));
        std::fs::write(file.path(), "# none\n").unwrap();
        for (toml, wanted) in [
            (format!("api-key-file = '{path}'"), "no key in it"),
            ("api-key-file = '/nowhere/keys'".to_owned(), "/nowhere/keys"),
            ("api-key = ['secret', ' ']".to_owned(), "must not be empty"),
        ] {
            let error = keys(&toml).unwrap_err();
            assert!(error.contains("--api-key") && error.contains(wanted), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn nothing_shows_a_key() {
        let http = read("api-key = ['a-very-secret-key']").unwrap();
        assert!(!format!("{http:?}").contains("secret"));
    }

    #[test]
    fn cors_is_closed_and_opened_as_vllm_spells_it() {
        assert_eq!(read("").unwrap().browsers.origins, [""; 0]);
        let toml =
            "allowed-origins = '[\"https://a.example\"]'\nallow-credentials = true\nallowed-hosts = ['h']";
        let browsers = read(toml).unwrap().browsers;
        assert_eq!((browsers.origins, browsers.credentials), (vec!["https://a.example".to_owned()], true));
        assert_eq!(browsers.hosts, ["h"]);
        for (toml, flag) in [
            ("allowed-origins = '[\"*\"]'\nallow-credentials = true", "--allow-credentials"),
            ("allowed-origins = 'https://a.example'", "--allowed-origins"),
            ("allowed-origins = '[\"a.example\"]'", "--allowed-origins"),
            ("allowed-origins = '[1]'", "--allowed-origins"),
            ("allowed-methods = '[\"A B\"]'", "--allowed-methods"),
            ("allowed-headers = '[\"a b\"]'", "--allowed-headers"),
            ("allowed-hosts = ['http://x']", "--allowed-hosts"),
        ] {
            let error = read(toml).unwrap_err();
            assert!(error.contains(flag), "{toml}: {error}");
        }
    }
}
