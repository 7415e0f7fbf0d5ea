//! Tags that the Jinja engine here does not read as transformers does, rewritten before it sees them.
//!
//! `{% generation %}` … `{% endgeneration %}` mark what a model is trained on. They are an extension of transformers that the Jinja engine here does not know and has no hook for. They become a filter
//! block, which keeps their whitespace control, around a scope of its own, which the tags have in transformers.

use minijinja::{Error, ErrorKind};

/// The filter that puts marks around the text between the tags.
pub(super) const FILTER: &str = "advtrain_generation";

/// The same template with generation tags turned into blocks of [`FILTER`], and whether there was any.
///
/// # Errors
/// If a string holds an escape that the engine would print as it stands.
pub(super) fn rewrite(source: &str) -> Result<(String, bool), Error> {
    let mut output = String::with_capacity(source.len());
    let mut found = false;
    let mut rest = source;
    while let Some((start, mut end)) = next_tag(rest) {
        output.push_str(&rest[..start]);
        let tag = &rest[start..end];
        if let Some(escape) = unknown_escape(tag) {
            return Err(Error::new(ErrorKind::SyntaxError, format!("the escape \\{escape} in {tag} is not supported")));
        }
        match tag_name(tag) {
            // Each tag's own ends, which carry the whitespace control, stay on the outside.
            "generation" => {
                output.push_str(&tag.replacen("generation", &format!("filter {FILTER} %}}{{% with"), 1));
                found = true;
            }
            "endgeneration" => output.push_str(&tag.replacen("endgeneration", "endwith %}{% endfilter", 1)),
            "raw" => {
                end += raw_block(&rest[end..]);
                // Jinja keeps the newline behind this tag, which the engine drops unless told otherwise.
                let body = &rest[start + tag.len()..end];
                let plain = tag.strip_suffix("%}").filter(|tag| !tag.ends_with(['-', '+']));
                match plain {
                    Some(tag) => output.extend([tag, "+%}", body]),
                    None => output.extend([tag, body]),
                }
            }
            _ => output.push_str(tag),
        }
        rest = &rest[end..];
    }
    output.push_str(rest);
    Ok((output, found))
}

/// The first of Python's escapes `\U` and `\N` in a string of a tag or expression.
fn unknown_escape(code: &str) -> Option<char> {
    let mut quote = None;
    let mut characters = code.chars().filter(|_| !code.starts_with("{#"));
    while let Some(character) = characters.next() {
        match quote {
            Some(_) if character == '\\' => {
                if let Some(escape @ ('U' | 'N')) = characters.next() {
                    return Some(escape);
                }
            }
            Some(open) if character == open => quote = None,
            None if matches!(character, '\'' | '"') => quote = Some(character),
            _ => {}
        }
    }
    None
}

/// The byte range of the next tag, expression or comment; none if there is no whole one.
fn next_tag(text: &str) -> Option<(usize, usize)> {
    let mut from = 0;
    loop {
        let start = from + text[from..].find('{')?;
        let inner = start + 2;
        let end = match text.as_bytes().get(start + 1) {
            Some(b'#') => inner + text[inner..].find("#}")?,
            Some(b'%') => inner + end_of_code(&text[inner..], "%}")?,
            Some(b'{') => inner + end_of_code(&text[inner..], "}}")?,
            _ => {
                from = start + 1;
                continue;
            }
        };
        return Some((start, end + 2));
    }
}

/// Where code ends, not counting an end that stands inside a string.
fn end_of_code(text: &str, end: &str) -> Option<usize> {
    let mut quote = None;
    let mut escaped = false;
    for (index, byte) in text.bytes().enumerate() {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if byte == b'\\' => escaped = true,
            Some(open) if byte == open => quote = None,
            Some(_) => {}
            None if byte == b'\'' || byte == b'"' => quote = Some(byte),
            None if text.as_bytes()[index..].starts_with(end.as_bytes()) => return Some(index),
            None => {}
        }
    }
    None
}

/// What stands in a `{% … %}` tag; nothing for expressions and comments.
fn tag_name(tag: &str) -> &str {
    let Some(inside) = tag.strip_prefix("{%").and_then(|tag| tag.strip_suffix("%}")) else { return "" };
    let inside = inside.strip_prefix(['-', '+']).unwrap_or(inside);
    let inside = inside.strip_suffix(['-', '+']).unwrap_or(inside);
    inside.trim()
}

/// The length of a raw block's text and its end tag, counted from behind its start tag.
fn raw_block(text: &str) -> usize {
    let mut from = 0;
    while let Some(start) = text[from..].find("{%").map(|start| from + start) {
        let Some(length) = text[start..].find("%}") else { break };
        let end = start + length + 2;
        if tag_name(&text[start..end]) == "endraw" {
            return end;
        }
        from = start + 2;
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whitespace_control_stays_outside() {
        let (source, found) = rewrite("a {%- generation -%} b {% endgeneration +%}").unwrap();
        assert!(found);
        assert_eq!(source, "a {%- filter advtrain_generation %}{% with -%} b {% endwith %}{% endfilter +%}");
    }

    #[test]
    fn strings_comments_and_raw_blocks_are_left_alone() {
        let untouched = [
            "{{ '{% generation %}' }}",
            r#"{{ "a\"{% generation %}" }}"#,
            "{# {% generation %} #}",
            "{% raw -%}{% generation %}{%- endraw -%}{% if x %}",
            "{% set generation = 1 %}{{ generation }}",
            "{ % generation % } {% generation",
        ];
        for source in untouched {
            assert_eq!(rewrite(source).unwrap(), (source.to_string(), false));
        }
    }

    #[test]
    fn tags_behind_other_code_are_found() {
        let (source, found) = rewrite("{# it's #}{{ \"it's\" }}{%generation%}x{%endgeneration%}").unwrap();
        assert!(
            found && source.ends_with("{%filter advtrain_generation %}{% with%}x{%endwith %}{% endfilter%}"),
            "{source}"
        );
    }
}
