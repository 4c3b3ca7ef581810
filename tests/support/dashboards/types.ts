// A dashboard as Grafana's own types describe it, with the options of each panel kind.
import type { Dashboard, Panel, RowPanel } from "@grafana/schema";
import type * as BarGauge from "@grafana/schema/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen";
import type * as Heatmap from "@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen";
import type * as Stat from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type * as StateTimeline from "@grafana/schema/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen";
import type * as Table from "@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
import type * as TimeSeries from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";

// JSON has no enums: an enum stands for the values of its members.
type Json<T> = unknown extends T
  ? T
  : T extends string
    ? `${T}`
    : T extends number
      ? `${T}` extends `${infer N extends number}`
        ? N
        : number
      : T extends (infer U)[]
        ? Json<U>[]
        : T extends object
          ? { [K in keyof T]: Json<T[K]> }
          : T;

type Query = {
  datasource: { type: "prometheus"; uid: "${datasource}" };
  editorMode: "code";
  expr: string;
  format: "time_series" | "heatmap" | "table";
  instant: boolean;
  range: boolean;
  legendFormat: string;
  refId: string;
};

type Of<Type extends string, Options, Custom> = Omit<
  Json<Panel>,
  "type" | "options" | "fieldConfig" | "targets"
> & {
  type: Type;
  title: string;
  description: string;
  options: Json<Options>;
  fieldConfig: Omit<Json<NonNullable<Panel["fieldConfig"]>>, "defaults"> & {
    defaults: Omit<Json<NonNullable<Panel["fieldConfig"]>["defaults"]>, "custom"> & {
      custom?: Json<Partial<Custom>>;
    };
  };
  targets: Query[];
};

type Known =
  | Of<"timeseries", TimeSeries.Options, TimeSeries.FieldConfig>
  | Of<"heatmap", Heatmap.Options, Heatmap.FieldConfig>
  | Of<"state-timeline", StateTimeline.Options, StateTimeline.FieldConfig>
  | Of<"stat", Stat.Options, never>
  | Of<"bargauge", BarGauge.Options, never>
  | Of<"table", Table.Options, Table.FieldConfig>
  | Json<RowPanel>;

export type Checked = Omit<Json<Dashboard>, "panels"> & { panels: Known[] };
