//! "Did you mean": the configured names nearest to one that is not configured.

const SHOWN_MAX: usize = 3;
/// Longer requests are no typing errors.
const LENGTH_MAX: usize = 128;

/// Up to three names, nearest first.
pub fn nearest<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let wanted = wanted.to_lowercase();
    if wanted.len() > LENGTH_MAX {
        return Vec::new();
    }
    let mut found: Vec<(usize, &str)> = names
        .filter_map(|name| {
            let known = name.to_lowercase();
            let distance = distance(&wanted, &known);
            let near = distance <= 2.max(wanted.chars().count() / 3);
            let part = wanted.len() >= 3 && (known.contains(&wanted) || wanted.contains(&known));
            (near || part).then_some((distance, name))
        })
        .collect();
    found.sort_unstable();
    found.dedup();
    found.into_iter().take(SHOWN_MAX).map(|(_, name)| name).collect()
}

/// Levenshtein's, in characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replace = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typing_errors_and_parts_are_found() {
        let names = ["mistral", "qwen2.5-coder:7b", "llava", "gpt-4o-mini"];
        let near = |wanted| nearest(wanted, names.into_iter());
        assert_eq!(near("mistrl"), ["mistral"]);
        assert_eq!(near("MISTRAL"), ["mistral"]);
        assert_eq!(near("qwen"), ["qwen2.5-coder:7b"]);
        assert_eq!(near("lava"), ["llava"]);
        assert!(near("something-else").is_empty());
        assert!(near(&"x".repeat(1000)).is_empty());
    }

    #[test]
    fn distances() {
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("same", "same"), 0);
    }
}
