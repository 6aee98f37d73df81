//! The engine's limits, and that it is Python's Jinja as far as templates go.

use minijinja::context;

use super::*;

const FUEL: u64 = 500_000;

fn render(source: &str) -> Result<String, Failure> {
    let template = Template::new(source).unwrap_or_else(|error| panic!("{source}: {error}"));
    let context = context! {
        list => vec![1, 2, 3, 4],
        text => "a</think>b\n\nc",
        map => Value::from_pairs([("z", 1), ("a", 2)]),
    };
    template.render(context, FUEL, Some("2026-05-12"))
}

#[track_caller]
fn gives(source: &str, expected: &str) {
    assert_eq!(render(source).as_deref(), Ok(expected), "{source}");
}

#[test]
fn python_s_methods_and_slices() {
    gives("{{ list[::-1] | list }} {{ list[1:][0] }} {{ list[-1] }}", "[4, 3, 2, 1] 2 4");
    gives("{{ text.split('</think>')[-1].lstrip('b').strip('\\n') }}", "c");
    gives("{{ text.startswith('a') }} {{ text.endswith('b') }} {{ 'b' in text }}", "True False True");
    gives("{% for k, v in map.items() %}{{ k }}{{ v }}{% endfor %} {{ map.get('x') is none }}", "z1a2 True");
    gives(
        "{{ 'x' is sequence }} {{ map is mapping }} {{ 'x' is iterable }} {{ 1 is iterable }}",
        "True True True False",
    );
    gives("{{ strftime_now('%d %b %Y') }}", "12 May 2026");
    gives("{{ '{} {}'.format(1, 'a') }}", "1 a");
    gives(
        "{{ 1e16 }} {{ 1e-7 | string }} {{ 2.0 }} {{ 1 is iterable }} {{ none is iterable }}",
        "1e+16 1e-07 2.0 False False",
    );
    gives("{% for i in list %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "12");
}

#[test]
fn additions_are_python_s() {
    gives("{{ 1 + 2 * 3 }} {{ 'a' + 'b' ~ 'c' + 'd' }} {{ 1.5 + 1 }} {{ (1 + 2) * 3 }}", "7 abcd 2.5 9");
    gives("{{ list + [5] + [6] }} {{ (list + [5])[-1] }} {{ [] + [] }}", "[1, 2, 3, 4, 5, 6] 5 []");
    gives("{% set x = text[0] + '\n' -%}\n  {{- x + 'é' + ('q' if x + '' else 'r') }}", "a\néq");
    gives("{{ list | sum }} {{ [{'n': 2}] | sum(attribute='n') }} {{ list | sum(start=1) }}", "10 2 11");
    let long = format!("{{{{ {} }}}}", ["'a'"; 60].join(" + "));
    gives(&long, &"a".repeat(60));
}

#[test]
fn blocks_are_trimmed_as_hugging_face_does() {
    gives("  {% if true %}\nx\n  {% endif %}\ny\n", "x\ny");
    gives("{%- if true %}\n    {{- 'a' }}\n{%- endif %}\n", "a");
    gives("a\r\n{% if true %}\r\nb\r{% endif %}", "a\nb\n");
}

#[test]
fn tojson_is_python_s() {
    gives("{{ map | tojson }}", r#"{"z": 1, "a": 2}"#);
    gives("{{ '<\\'&>\"\\\\é\\n' | tojson }}", r#""<'&>\"\\é\n""#);
    gives("{{ 'é🦀' | tojson(ensure_ascii=true) }}", r#""\u00e9\ud83e\udd80""#);
    gives("{{ [1.0, true, none, []] | tojson }}", "[1.0, true, null, []]");
    gives(
        "{{ {'b': [1], 'a': {}} | tojson(indent=2, sort_keys=true) }}",
        "{\n  \"a\": {},\n  \"b\": [\n    1\n  ]\n}",
    );
    gives("{{ [1, {'a': 2}] | tojson(separators=(',', ':')) }}", r#"[1,{"a":2}]"#);
    assert!(matches!(render("{{ nothing | tojson }}"), Err(Failure::Broken(_))));
    assert!(matches!(render("{{ map | tojson(colour=1) }}"), Err(Failure::Broken(_))));
}

#[test]
fn templates_can_refuse() {
    let error =
        render("{% macro f() %}{{ raise_exception('no ' ~ 'tools') }}{% endmacro %}{{ f() }}").unwrap_err();
    assert_eq!(error, Failure::Raised("no tools".to_owned()));
}

#[test]
fn generation_tags_are_let_through() {
    gives("a{%- generation -%} b {%- endgeneration -%} c", "abc");
    gives("{% generation %}{{ 'x' }}{% endgeneration %}", "x");
    gives("{{ '{% generation' }}", "{% generation");
}

#[test]
fn time_and_memory_are_bounded() {
    for source in [
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{% set ns = namespace(a='aa') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
        "{% set ns = namespace(a='aa') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}",
        "{{ range(100000) | join('aaaaaaaa' * 100000) }}",
        "{{ 'a' | indent(1000000000) }}",
        // Lists, which the engine joins for nothing until it copies them.
        "{% set ns = namespace(a=list) %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a | length }}",
        "{% set ns = namespace(a=[1] * 100000) %}{% for i in range(60) %}{% set ns.a = ns.a + [1] %}{% endfor %}done",
        "{% set ns = namespace(a=[1] * 100000) %}{% for i in range(60) %}{% set ns.a = [1] + ns.a %}{% endfor %}done",
        "{% macro f(a, n) %}{% if n %}{{ f(a + a, n - 1) }}{% endif %}{% endmacro %}{{ f(list, 40) }}",
        "{% set joined = 1 %}{% for a in [list] recursive %}{{ loop([a + a]) }}{% endfor %}",
    ] {
        assert_eq!(render(source), Err(Failure::TooMuch), "{source}");
    }
    for source in [
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{{ '{:>9999999999}'.format(5) }}",
        "{{ '%99999999d' | format(5) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set ns = namespace(a=list) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] | sum(start=[]) %}{% endfor %}",
        "{{ ['aaaaaaaa' * 100000] * 100000 | sum(start='') }}",
        "{% set ns = namespace(a=list) %}{% for i in range(60) %}{% set ns.a = ns.a | chain(ns.a) %}{% endfor %}",
    ] {
        assert!(
            matches!(Template::new(source).map(|_| render(source)), Ok(Err(Failure::Broken(_))) | Err(_)),
            "{source}"
        );
    }
}

/// Values nested as deep as fuel allows are dropped, and written or refused, without a stack overflow.
#[test]
fn deep_values_do_not_overflow_the_stack() {
    let nest = |body: &str| {
        format!(
            "{{% set ns = namespace(a=[]) %}}{{% for i in range(99999) %}}{{% set ns.a = [ns.a] %}}{{% endfor %}}{body}"
        )
    };
    for body in ["done", "{{ ns.a }}", "{{ ns.a | tojson }}", "{{ ns.a == [ns.a] }}"] {
        // What comes of it does not matter, only that something does.
        let _ = render(&nest(body));
    }
}

#[test]
fn bad_sources_are_refused() {
    for source in [
        "{% if %}".to_owned(),
        "{{ a".to_owned(),
        "{% include 'x' %}".to_owned(),
        "(".repeat(MAX_SOURCE + 1),
        format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000)),
        format!("{}{}", "{% if 1 %}".repeat(50_000), "{% endif %}".repeat(50_000)),
    ] {
        assert!(Template::new(&source).is_err(), "{}", &source[..source.len().min(60)]);
    }
}
