//! What the attacker replies: JSON, more or less.

use serde_json::Value;

/// The prompt of the attacker's JSON: of the first object in the reply that has one.
pub(super) fn prompt_of(reply: &str) -> Option<String> {
    let starts = reply.match_indices('{').map(|(at, _)| &reply[at..]);
    let mut prompts = starts.filter_map(|json| {
        let value = object(json).or_else(|| object(&with_escapes(json)))?;
        Some(value.get("prompt")?.as_str()?.trim().to_string())
    });
    prompts.find(|prompt| !prompt.is_empty())
}

/// The value that a text begins with.
fn object(json: &str) -> Option<Value> {
    serde_json::Deserializer::from_str(json).into_iter::<Value>().next()?.ok()
}

/// JSON with the line ends and other control characters in its texts as JSON writes them; many models write them as
/// they are.
fn with_escapes(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    let (mut in_text, mut behind_backslash) = (false, false);
    for character in json.chars() {
        if in_text && character.is_control() {
            escaped.push_str(&format!("\\u{:04x}", u32::from(character)));
        } else {
            escaped.push(character);
        }
        in_text ^= character == '"' && !behind_backslash;
        behind_backslash = in_text && character == '\\' && !behind_backslash;
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prompt_is_found_among_other_words() {
        let found = |reply: &str| prompt_of(reply);
        assert_eq!(found(r#"Sure: {"improvement": "{", "prompt": " do {it} "} done"#), Some("do {it}".into()));
        assert_eq!(found(r#"{"a": 1} {"prompt": "b"}"#), Some("b".into()));
        for reply in [r#"{"improvement": "x", "prompt": "y"#, r#"{"prompt": ""}"#, r#"{"prompt": 3}"#, "no", ""] {
            assert_eq!(found(reply), None, "{reply}");
        }
    }

    #[test]
    fn texts_may_hold_line_ends_as_they_are() {
        let reply = "{\n\t\"improvement\": \"a \\\"b\\\"\\\\\",\n\t\"prompt\": \"one\ntwo\\n\tthree\"\n}\n";
        assert_eq!(prompt_of(reply), Some("one\ntwo\n\tthree".into()));
    }
}
