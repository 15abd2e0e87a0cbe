{{/* Names are the release's own, so that two releases can live in two namespaces. */}}
{{- define "octavo.name" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- $base := .Values.nameOverride | default .Release.Name -}}
{{- printf "%s-operator" ($base | trunc 50 | trimSuffix "-") -}}
{{- end -}}
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
