//! Names in paths: `org/model` and `qwen:7b`, encoded or not.

/// Splits a path after `/models/` (already percent-decoded) into what its longest resolvable
/// beginning means, and the rest: empty, or a verb.
pub fn split<T>(path: &str, resolve: impl Fn(&str) -> Option<T>) -> Option<(T, &str)> {
    let slashes = path.rmatch_indices('/').map(|(at, _)| at);
    std::iter::once(path.len()).chain(slashes).find_map(|end| {
        let found = resolve(&path[..end])?;
        Some((found, path[end..].strip_prefix('/').unwrap_or_default()))
    })
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn the_longest_configured_name_wins() {
        const NAMES: [&str; 3] = ["a", "a/b", "qwen2.5-coder:7b"];
        let meaning = |path| {
            split(path, |name| NAMES.into_iter().find(|&known| known == name))
                .map(|(name, rest)| (name, rest.to_owned()))
        };
        let is = |name, rest: &str| Some((name, rest.to_owned()));
        assert_eq!(meaning("a"), is("a", ""));
        assert_eq!(meaning("a/b"), is("a/b", ""));
        assert_eq!(meaning("a/b/load"), is("a/b", "load"));
        assert_eq!(meaning("a/load"), is("a", "load"));
        assert_eq!(meaning("a/c/load"), is("a", "c/load"));
        assert_eq!(meaning("qwen2.5-coder:7b/unload"), is("qwen2.5-coder:7b", "unload"));
        assert_eq!(meaning("ab"), None);
        assert_eq!(meaning("/a"), None);
        assert_eq!(meaning(""), None);
    }
}
