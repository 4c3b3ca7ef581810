//! Whether declared needs fit on declared GPUs, all at once.

use crate::units::Bytes;

pub(super) enum Need {
    /// `bytes` on each of any `gpus` GPUs.
    Any { bytes: Bytes, gpus: usize },
    /// `bytes` on each of these GPUs.
    On { bytes: Bytes, on: Vec<usize> },
}

/// Tries placements until one fits. Gives up in favour of "fits" after a bound, because only a
/// certain no may be an error.
pub(super) fn fits(free: &[Bytes], needs: &[Need]) -> bool {
    let mut free = free.to_vec();
    let mut open: Vec<(Bytes, usize)> = Vec::new();
    for need in needs {
        match need {
            Need::On { bytes, on } => {
                for gpu in on {
                    match free.get_mut(*gpu) {
                        Some(left) if *left >= *bytes => *left -= *bytes,
                        _ => return false,
                    }
                }
            }
            Need::Any { bytes, gpus } => open.push((*bytes, *gpus)),
        }
    }
    // Large ones first: a no shows early.
    open.sort_by_key(|need| std::cmp::Reverse(*need));
    let mut search = Search { free, tries: 20_000 };
    search.place(&open, 0, open.first().map_or(0, |(_, gpus)| *gpus))
}

struct Search {
    free: Vec<Bytes>,
    tries: u32,
}

impl Search {
    /// Places the first need on `left` more GPUs from `from` on, then the other needs.
    fn place(&mut self, needs: &[(Bytes, usize)], from: usize, left: usize) -> bool {
        let Some((bytes, _)) = needs.first() else { return true };
        if left == 0 {
            let next = needs.get(1).map_or(0, |(_, gpus)| *gpus);
            // Of equal needs the later one goes to the same GPU or a later one, never back.
            let alike = next == 1 && needs.get(1) == needs.first();
            return self.place(&needs[1..], if alike { from - 1 } else { 0 }, next);
        }
        let mut tried: Vec<Bytes> = Vec::new();
        for gpu in from..self.free.len() {
            let room = self.free[gpu];
            // GPUs with equal room are interchangeable for a need of one GPU.
            if room < *bytes || left == 1 && tried.contains(&room) {
                continue;
            }
            if self.tries == 0 {
                return true;
            }
            self.tries -= 1;
            tried.push(room);
            self.free[gpu] = room - *bytes;
            if self.place(needs, gpu + 1, left - 1) {
                return true;
            }
            self.free[gpu] = room;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(gib: u64, gpus: usize) -> Need {
        Need::Any { bytes: Bytes::gib(gib), gpus }
    }

    #[test]
    fn finds_the_one_placement_that_works() {
        let free = [Bytes::gib(24), Bytes::gib(16)];
        assert!(fits(&free, &[any(10, 1), any(14, 1), any(16, 1)]));
        assert!(!fits(&free, &[any(13, 1), any(14, 1), any(12, 1)]));
        assert!(fits(&free, &[any(12, 2), any(12, 1)]));
        assert!(!fits(&free, &[any(17, 2)]));
    }

    #[test]
    fn explicit_gpus_are_kept_to() {
        let on = |gib, on: &[usize]| Need::On { bytes: Bytes::gib(gib), on: on.to_vec() };
        let free = [Bytes::gib(24), Bytes::gib(24)];
        assert!(!fits(&free, &[on(20, &[0]), on(20, &[0])]));
        assert!(fits(&free, &[on(20, &[0]), any(20, 1)]));
        assert!(!fits(&free, &[on(1, &[2])]));
    }

    #[test]
    fn many_equal_needs_are_decided() {
        let free = vec![Bytes::gib(24); 8];
        let needs = |n| (0..n).map(|_| any(7, 1)).collect::<Vec<Need>>();
        assert!(fits(&free, &needs(24)));
        assert!(!fits(&free, &needs(25)));
    }
}
