use std::time::Duration;

use super::sheet::ticks;
use super::*;
use crate::replay::{Stay, Visit};
use crate::units::{Bytes, GpuId, ModelName};

/// Models take turns, each for ten seconds of a minute; everyone waits for a second more than the
/// one before.
fn run(policy: &str, models: &[&str], turns: u64) -> Run {
    let (mut visits, mut stays) = (Vec::new(), Vec::new());
    for turn in 0..turns {
        let model = ModelName::new(models[turn as usize % models.len()]);
        let began = Time(turn * 10_000);
        let arrived = Time(began.0.saturating_sub(turn * 1000));
        visits.push(Visit {
            model: model.clone(),
            arrived,
            began: (turn % 7 != 6).then_some(began),
            ended: Some(began + Duration::from_secs(5)),
            refused: None,
        });
        stays.push(Stay {
            model,
            gpus: vec![GpuId(0), GpuId(1)],
            bytes: Bytes::gib(9),
            began,
            ready: (turn % 5 != 4).then(|| began + Duration::from_secs(3)),
            left: Some(began + Duration::from_secs(8)),
            ended: began + Duration::from_secs(9),
        });
    }
    Run { policy: policy.to_owned(), visits, stays, ended: Time(turns * 10_000) }
}

/// Every element closed in its order, every attribute quoted, nothing unescaped: gives its texts.
fn texts(svg: &str) -> Vec<String> {
    let (mut open, mut texts, mut rest) = (Vec::new(), Vec::new(), svg);
    while let Some((text, after)) = rest.split_once('<') {
        assert!(!text.contains('>'), "an unescaped >: {text}");
        texts.push(unescaped(text));
        let (tag, after) = after.split_once('>').expect("the end of a tag");
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "of {tag}");
            continue;
        }
        let body = tag.strip_suffix('/').unwrap_or(tag);
        let (name, mut attributes) = body.split_once(' ').unwrap_or((body, ""));
        assert!(name.chars().all(|c| c.is_ascii_alphabetic()), "{tag}");
        while let Some((key, after)) = attributes.trim_start().split_once("=\"") {
            assert!(key.chars().all(|c| c.is_ascii_alphabetic() || c == '-'), "{key} in {tag}");
            let (value, after) = after.split_once('"').expect("a closing quote");
            unescaped(value);
            attributes = after;
        }
        assert_eq!(attributes.trim(), "", "in {tag}");
        if !tag.ends_with('/') {
            open.push(name);
        }
    }
    assert_eq!((open, rest.trim()), (Vec::new(), ""));
    texts
}

fn unescaped(text: &str) -> String {
    let known = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#39;", "'")];
    let mut plain = text.to_owned();
    for (entity, c) in known {
        plain = plain.replace(entity, c);
    }
    assert!(!plain.replace("&amp;", "").contains('&'), "an unescaped &: {text}");
    plain.replace("&amp;", "&")
}

#[test]
fn every_policy_and_model_is_named_and_escaped() {
    let models = ["qwen<3>", "a&b", "\"quoted\"", "bell\u{7}"];
    let runs = [run("fair", &models, 40), run("exhaustive", &models, 30), run("<fifo>", &[], 0)];
    let svg = plot("Tuesday & \"friends\" < 5", &runs);
    let texts = texts(&svg);
    let has = |wanted: &str| texts.iter().any(|text| text == wanted);
    for wanted in ["qwen<3>", "a&b", "\"quoted\"", "bell\u{fffd}", "fair", "exhaustive", "<fifo>"] {
        assert!(has(wanted), "{wanted} in {texts:?}");
    }
    assert!(has("Tuesday & \"friends\" < 5") && has("no request was served"));
    assert!(has("Models on the GPUs: <fifo>"));
    let stay = "a&b on GPU 0, 1, 9.0 GiB: begun at 10s, ready at 13s, gone at 19s";
    assert!(has(stay), "{texts:?}");
    assert!(!svg.contains("<script") && !svg.contains("http://www.w3.org/1999/xlink"));
}

#[test]
fn lanes_are_bounded_and_the_others_share_one() {
    let models: Vec<String> = (0..40).map(|at| format!("m{at:02}")).collect();
    let models: Vec<&str> = models.iter().map(String::as_str).collect();
    let texts = texts(&plot("many", &[run("fair", &models, 400)]));
    assert!(texts.iter().any(|text| text == "m14") && !texts.iter().any(|text| text == "m15"));
    assert!(texts.iter().any(|text| text == "25 others"));
}

#[test]
fn nothing_and_a_moment_are_pictures_too() {
    texts(&plot("none", &[]));
    let mut short = run("fair", &["a"], 1);
    (short.ended, short.stays[0].ended) = (Time(0), Time(0));
    texts(&plot("short", &[short, Run::default()]));
}

#[test]
fn its_size_is_bounded() {
    let models: Vec<String> = (0..60).map(|at| format!("model-{at}")).collect();
    let models: Vec<&str> = models.iter().map(String::as_str).collect();
    let runs = ["fair", "exhaustive", "fifo"].map(|policy| run(policy, &models, 100_000));
    let svg = plot("long", &runs);
    texts(&svg);
    assert!(svg.len() < 1_000_000, "{} bytes", svg.len());
    // One by one is the larger way.
    let runs = ["fair", "exhaustive", "fifo"].map(|policy| run(policy, &models[..8], 500));
    let svg = plot("detailed", &runs);
    assert!(svg.len() < 1_000_000, "{} bytes", svg.len());
}

#[test]
fn lines_lie_where_the_waits_do() {
    let visit = |arrived, began| Visit {
        model: "a".into(),
        arrived: Time(arrived),
        began: Some(Time(began)),
        ended: None,
        refused: None,
    };
    // Of a hundred seconds, the panel's full height is the longest wait: 40 s.
    let visits = vec![visit(0, 40_000), visit(50_100, 60_100), visit(50_101, 50_101)];
    let run = Run { policy: "fair".into(), visits, stays: Vec::new(), ended: Time(100_000) };
    let svg = plot("waits", &[run]);
    let lines: Vec<&str> = svg.lines().filter(|line| line.contains("class=\"line\"")).collect();
    assert_eq!(lines.len(), 4, "one in the heading, one in each panel");
    // 200 buckets on 1000 units from 170; a panel is 120 high, and some above it.
    let longest = lines[3].split("d=\"M").nth(1).expect("a path");
    let numbers: Vec<f64> = longest
        .split(|c: char| !c.is_ascii_digit() && c != '.')
        .filter_map(|number| number.parse().ok())
        .collect();
    let [x, y, to, other_x, other_y, other_to] = numbers[..] else { panic!("{longest}") };
    assert_eq!((x, to, other_x, other_to), (170.0, 175.0, 670.0, 675.0));
    assert_eq!(other_y - y, 90.0, "10 s of 40 s");
    assert!(svg.contains("mean 16.7 s, p50 10.0 s, p95 40.0 s, p99 40.0 s, longest 40.0 s"));
}

#[test]
fn ticks_are_round_and_few() {
    let labels = |max, count| ticks(max, count).map(|(_, label)| label).collect::<Vec<_>>();
    assert_eq!(labels(0, 5), ["0"]);
    assert_eq!(labels(95, 5), ["0", "0.02 s", "0.04 s", "0.06 s", "0.08 s"]);
    assert_eq!(labels(438_000, 5), ["0", "2 min", "4 min", "6 min"]);
    assert_eq!(labels(90_000, 5), ["0", "20 s", "40 s", "60 s", "80 s"]);
    let days = 86_400_000;
    assert_eq!(labels(9 * days, 12).last().map(String::as_str), Some("9 d"));
    for max in [1, 999, 123_456, 7 * days, 400 * days, 1_000_000 * days, u64::MAX] {
        assert!(ticks(max, 12).count() <= 13, "{max}");
    }
}
