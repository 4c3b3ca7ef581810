//! models.yaml → a validated [`catalog::Catalog`], or every error at once with line and column.

pub mod catalog;
