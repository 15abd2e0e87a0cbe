{{/* Names are the release's own, so that two releases can live in two namespaces. */}}
{{- define "octavo.name" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- $base := .Values.nameOverride | default .Release.Name -}}
{{- printf "%s-operator" ($base | trunc 50 | trimSuffix "-") -}}
{{- end -}}
{{- end }}

{{/* Of the activator: "RELEASE-activator", or what the operator's name is made of. */}}
{{- define "octavo.activator" -}}
{{- $base := .Values.fullnameOverride | default .Values.nameOverride | default .Release.Name -}}
{{- printf "%s-activator" ($base | trunc 50 | trimSuffix "-") -}}
{{- end }}

{{- define "octavo.activatorAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- include "octavo.activator" . -}}
{{- else -}}
{{- .Values.activator.serviceAccountName | default (include "octavo.activator" .) -}}
{{- end -}}
{{- end }}

{{- define "octavo.activatorSelector" -}}
app.kubernetes.io/name: octavo-activator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: activator
{{- end }}

{{- define "octavo.activatorLabels" -}}
{{ include "octavo.activatorSelector" . }}
{{ include "octavo.commonLabels" . }}
{{- end }}

{{- define "octavo.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "octavo.name" .) -}}
{{- end }}

{{- define "octavo.selector" -}}
app.kubernetes.io/name: octavo-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "octavo.labels" -}}
{{ include "octavo.selector" . }}
{{ include "octavo.commonLabels" . }}
{{- end }}

{{- define "octavo.commonLabels" -}}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* "annotations:" with the common ones and those given as a second argument; nothing where there are none. */}}
{{- define "octavo.annotations" -}}
{{- $root := index . 0 -}}
{{- $all := merge (dict) (index . 1) $root.Values.commonAnnotations -}}
{{- with $all }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Whether a part that needs a kind of the Prometheus operator is to be made: (list root value kind). */}}
{{- define "octavo.monitors" -}}
{{- $root := index . 0 -}}
{{- $asked := index . 1 | toString -}}
{{- if or (eq $asked "true") (and (eq $asked "auto") ($root.Capabilities.APIVersions.Has (printf "monitoring.coreos.com/v1/%s" (index . 2)))) -}}
true
{{- end -}}
{{- end }}

{{/* What every container of the chart's own pods may do: nothing beside its work. */}}
{{- define "octavo.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "octavo.confinedPod" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Pull secrets and where the chart's own pods run: a list of the root and of the labels by which pods are spread. */}}
{{- define "octavo.placement" -}}
{{- $root := index . 0 -}}
{{- $operator := $root.Values.operator -}}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $operator.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $operator.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $operator.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $operator.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  {{- if $operator.topologySpreadConstraints }}
  {{- toYaml $operator.topologySpreadConstraints | nindent 2 }}
  {{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- index . 1 | nindent 8 }}
  {{- end }}
{{- end }}
